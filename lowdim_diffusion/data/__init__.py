r"""Data sets and stateless batches.

A :class:`Dataset` holds its examples in memory, ``x_0`` in ``[N, *data]``. A batch is a pure
function of ``(arrays, key, step)``, so there is no iterator to save: resuming at step ``s`` draws
what the uninterrupted run would have drawn, and every device draws its own part of the same batch.

A :class:`LazyDataset` is read as its examples are drawn, by a :class:`Stream` of the same batches,
which decodes ahead of the training: for data that do not fit.

8-bit pictures are scaled to [-1, 1] by ``x / 127.5 - 1`` as they are drawn; vectors are kept as
they are.

Files are read as if somebody hostile had written them: no pickle is executed, nothing is unpacked
to disk, sizes are checked before memory is taken, and every failure is a one-line
:class:`DataError`.
"""

from lowdim_diffusion.data._batches import Batcher, batches
from lowdim_diffusion.data._dataset import (
    DataError,
    Dataset,
    denormalize,
    from_arrays,
    from_uint8,
    to_uint8,
)
from lowdim_diffusion.data._lazy import LazyDataset, RandomAccess, fingerprint, from_source
from lowdim_diffusion.data._load import BUILT_IN, load, load_lazy
from lowdim_diffusion.data._stream import Chunk, Feed, Stream, stream
from lowdim_diffusion.data._synthetic import digits, molrg

__all__ = [
    "BUILT_IN",
    "Batcher",
    "Chunk",
    "DataError",
    "Dataset",
    "Feed",
    "LazyDataset",
    "RandomAccess",
    "Stream",
    "batches",
    "denormalize",
    "digits",
    "fingerprint",
    "from_arrays",
    "from_source",
    "from_uint8",
    "load",
    "load_lazy",
    "molrg",
    "stream",
    "to_uint8",
]
