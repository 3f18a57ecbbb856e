"""Small files that claim, or unfold to, enormous ones."""

import struct
import zlib

MIB = 2**20


def deflated_zeros(count, head=b""):
    """Raw deflate of ``head`` and ``count`` MiB of zeros: one flushed block, repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * count + packer.flush()


def zip_bomb(path, name, count, head=b"", claim=None):
    """A zip of one member of ``count`` MiB; ``claim`` bytes if it shall lie about that."""
    packed = deflated_zeros(count, head)
    size = len(head) + count * MIB if claim is None else claim
    sizes = struct.pack("<IIIHH", 0, len(packed), size, len(name), 0)
    fields = struct.pack("<HHHHH", 20, 0, 8, 0, 0)
    local = b"PK\3\4" + fields + sizes + name.encode() + packed
    entry = b"PK\1\2\x14\0" + fields + sizes + bytes(14) + name.encode()
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    path.write_bytes(local + entry + end)
    return path


def npy(shape, descr="<f8"):
    """The header of a ``.npy`` file."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
