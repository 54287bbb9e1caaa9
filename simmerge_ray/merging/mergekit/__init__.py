"""mergekit's YAML files, read and written: documents, their compilation to a merge graph, and plans as documents.

The meaning of a file follows mergekit 0.1.5, whose results users compare with; what it ignores in silence (unknown
keys, parameters at a level where they have no effect) is named in a warning here. No torch.
"""

from simmerge_ray.merging.mergekit.compiling import compile_mergekit
from simmerge_ray.merging.mergekit.documents import MergekitDocument, ModelName, Rule, Slice, Source, documents_text
from simmerge_ray.merging.mergekit.reading import read_mergekit
from simmerge_ray.merging.mergekit.writing import write_mergekit
