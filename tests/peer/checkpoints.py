"""The checkpoints that the cases name, in a directory for each family."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tests import tiny
from tests.peer.families import CHARACTERS, make_checkpoints, make_model


def make_family(root: Path, family: str) -> Path:
    """The directory of a family's checkpoints, made where it is not there."""
    path = root / family
    if not path.exists():
        names = ("base", "a", "b", "c") if family == "llama" else ("base", "a", "b")
        make_checkpoints(path, family, names)
        if family == "llama":
            shutil.copytree(path / "a", path / "a-again")
            shutil.copytree(path / "a", path / "bare", ignore=shutil.ignore_patterns("*token*"))
            for name, other, entries in (
                ("tied", "llama-tied", {}),
                ("wide", "llama", {"hidden_size": 16}),
                ("mistral", "mistral", {}),
            ):
                make_model(other, 7, **entries).save_pretrained(path / name)
                tiny.write_tokenizer(path / name, CHARACTERS)
    return path


class CheckpointTensors:
    """Tensors of all checkpoints of a directory, float64; a head that is tied and not stored is the embeddings."""

    def __init__(self, path: Path) -> None:
        self._files = {
            one.name: {
                name: tensor.double().numpy()
                for file in sorted(one.glob("*.safetensors"))
                for name, tensor in load_file(file).items()
            }
            for one in path.iterdir()
            if (one / "config.json").exists()
        }
        self.name = ""

    def __getitem__(self, checkpoint: str) -> np.ndarray:
        return self.of(checkpoint, self.name)

    def of(self, checkpoint: str, name: str) -> np.ndarray:
        tensors = self._files[checkpoint]
        return tensors[name if name in tensors else name.replace("lm_head", "model.embed_tokens")]
