"""What a store costs: a checkpoint read by ranges, cold and from the node's cache, beside plain requests and a local
file; and a store that is away while something is written and read.

`python -m benchmarks.storage [--mb 256] [--away 60]` starts an S3 server (moto, one Python process) on this machine and
prints JSON. The server is the limit of the cold figures: look at the ratio to plain requests.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.measuring import machine, script_parser, seconds_of
from simmerge_ray.service.http.listening import free_port
from tests.object_store import Proxy, credentials, make_bucket, s3_server


def read_all(ref: Any) -> None:
    from simmerge_ray.merging.engine.sources import TensorSource

    source = TensorSource(ref)
    for name in source.specs:
        source.read_whole(name)
    source.close()


def reading(local: Path, remote: Any, num_bytes: int) -> dict[str, float]:
    """GB/s of whole checkpoints, tensor by tensor, and what a header and one tensor take."""
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.merging.engine.sources import TensorSource

    here, there = CheckpointRef("here", local), CheckpointRef("there", remote)

    def plain() -> None:
        for start in range(0, num_bytes, 1 << 26):
            (remote / "model.safetensors").read_range(start, min(start + (1 << 26), num_bytes))

    found = {"header_s": seconds_of(lambda: read_headers(there))}
    found["one_tensor_of_1_mb_s"] = seconds_of(lambda: TensorSource(there).read_whole("small"))
    found["plain_requests_gb_s"] = num_bytes / seconds_of(plain) / 1e9
    found["cold_gb_s"] = num_bytes / seconds_of(lambda: read_all(there)) / 1e9
    found["cached_gb_s"] = num_bytes / seconds_of(lambda: read_all(there)) / 1e9
    found["local_gb_s"] = num_bytes / seconds_of(lambda: read_all(here)) / 1e9
    return found


def away(proxy: Proxy, uri: str, for_s: float) -> dict[str, float]:
    """A store that goes away for so long, with a write and a read that begin then."""
    from simmerge_ray.base.storage import read_bytes, write_atomically

    write_atomically(f"{uri}/before", b"x")
    proxy.down()
    timer = threading.Timer(for_s, proxy.up)
    timer.start()
    reader: list[float] = []
    thread = threading.Thread(target=lambda: reader.append(seconds_of(lambda: read_bytes(f"{uri}/before"))))
    thread.start()
    writer = seconds_of(lambda: write_atomically(f"{uri}/after", b"y"))
    thread.join()
    timer.join()
    assert read_bytes(f"{uri}/after") == b"y"
    return {"away_s": for_s, "write_s": writer, "read_s": reader[0]}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--away", type=float, default=60.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root, port = Path(directory), free_port()
        os.environ.update(credentials(port), SIMMERGE_CACHE_DIR=str(root / "cache"))
        from simmerge_ray.base.storage import as_place, upload_directory

        with s3_server(port, root / "log") as url:
            make_bucket(url, "figures")
            local = root / "checkpoint"
            local.mkdir()
            rows = np.random.default_rng(0).standard_normal((max(1, given.mb // 16), 4_000_000 // 2), dtype=np.float32)
            tensors = {f"layer.{number}": row for number, row in enumerate(np.repeat(rows, 2, axis=0))}
            save_file(tensors | {"small": np.zeros(250_000, dtype=np.float32)}, str(local / "model.safetensors"))
            (local / "config.json").write_text("{}")
            size = (local / "model.safetensors").stat().st_size
            place: Any = as_place("s3://figures/checkpoint")
            result: dict[str, Any] = {"machine": machine(), "mb": size / 1e6}
            result["upload_gb_s"] = size / seconds_of(lambda: upload_directory(local, place, "config.json")) / 1e9
            result |= reading(local, place, size)
            proxy = Proxy(port)
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
            import fsspec

            fsspec.get_filesystem_class("s3").clear_instance_cache()
            result |= away(proxy, "s3://figures", given.away)
            proxy.down()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
