"""Places (local paths and URIs), files and directories that are whole or absent, manifests, and the node's cache.

Layers, left to right: `stores` (file systems of object stores, with back-off), `places` (names, and what lies there),
`objects` (single files and objects), `outputs` (may they be written?), `manifests`, `node_cache`, `ranges` (parts of
files), `directories`.
"""

from simmerge_ray.base.storage.directories import (
    CONTENTS,
    filled_in_place,
    is_complete,
    local_directory,
    new_directory,
    publish_directory,
    remove_directory,
    scratch_directory,
    upload_directory,
)
from simmerge_ray.base.storage.manifests import Manifest, versions
from simmerge_ray.base.storage.objects import (
    canonical_json,
    delete_objects,
    digest_bytes,
    digest_file,
    digest_json,
    file_names,
    file_size,
    file_version,
    jsonl_bytes,
    list_leftovers,
    list_objects,
    open_file,
    read_bytes,
    read_json,
    read_json_object,
    read_jsonl,
    read_text,
    write_atomically,
    write_json,
)
from simmerge_ray.base.storage.outputs import Output, check_outputs
from simmerge_ray.base.storage.places import Place, RemotePath, as_place, list_places, name_below, nothing_in, place_in
from simmerge_ray.base.storage.ranges import RangeReader, open_ranges, read_range
