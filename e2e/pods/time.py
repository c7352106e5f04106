"""Times warm reads: what the kernel had cached of a file is dropped before it is read, so its bytes come through FUSE.

    time.py DIR PASSES

Prints the seconds that all files below took, each opened and read so many times, and the bytes read.
"""
import json, os, sys, time

files = sorted(os.path.join(directory, name) for directory, _, names in os.walk(sys.argv[1]) for name in names)
buffer = bytearray(1 << 20)


def read(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        total = 0
        while got := os.readv(descriptor, [buffer]):
            total += got
        return total
    finally:
        os.close(descriptor)


begin = time.monotonic()
total = sum(read(path) for _ in range(int(sys.argv[2])) for path in files)
print(json.dumps({"seconds": time.monotonic() - begin, "bytes": total}), flush=True)
