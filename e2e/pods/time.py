"""Times warm reads: what the kernel had cached of a file is dropped before it is read, so its bytes come through FUSE.

    time.py DIR

Prints the seconds that the largest file took (after it was read once), and those of all the others, each opened and
read once.
"""
import json, os, sys, time

files = [os.path.join(directory, name) for directory, _, names in os.walk(sys.argv[1]) for name in sorted(names)]
files.sort()
largest = max(files, key=os.path.getsize)
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


def timed(paths):
    begin = time.monotonic()
    total = sum(map(read, paths))
    return time.monotonic() - begin, total


seconds, total = timed([largest])
small, others = timed([path for path in files if path != largest])
print(json.dumps({"sequential": seconds, "small": small, "bytes": [total, others]}), flush=True)
