r"""Data sets and stateless batches.

A :class:`Dataset` holds its examples in memory, ``x_0`` in ``[N, *data]``. A batch is a pure
function of ``(arrays, key, step)``, so there is no iterator to save: resuming at step ``s`` draws
what the uninterrupted run would have drawn, and every device draws its own part of the same batch.

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
    to_uint8,
)
from lowdim_diffusion.data._load import BUILT_IN, load
from lowdim_diffusion.data._synthetic import digits, molrg

__all__ = [
    "BUILT_IN",
    "Batcher",
    "DataError",
    "Dataset",
    "batches",
    "denormalize",
    "digits",
    "from_arrays",
    "load",
    "molrg",
    "to_uint8",
]
