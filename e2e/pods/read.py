"""Reads the files of e2e/src/data.rs in a pod, and checks every byte against the generator, never against another read.

    read.py DIR [--loop] [--direct] [--hold] [--threads N] [--versions N]

A file's bytes follow from its name and its version: sha256("PATH#VERSION"), over and over, to the length in its name
(`NAME-LENGTH.bin`). Once: every file is read, then the result is printed. With --loop: until SIGTERM; /tmp/status has the
numbers so far. --hold keeps 16 files open and reads them again and again. A file may be of any version below --versions,
but of one only; ESTALE is counted apart: it is what a version that is gone gives.
"""
import argparse, errno, hashlib, json, mmap, os, random, re, signal, sys, threading, time

parser = argparse.ArgumentParser()
parser.add_argument("dir")
parser.add_argument("--loop", action="store_true")
parser.add_argument("--direct", action="store_true")
parser.add_argument("--hold", action="store_true")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--versions", type=int, default=1)
args = parser.parse_args()

status = {"files": 0, "bytes": 0, "errors": 0, "wrong": 0, "stale": 0, "passes": 0, "longest": 0.0, "first": ""}
lock, stop = threading.Lock(), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())


def expected(path, version, length):
    unit = hashlib.sha256(f"{path}#{version}".encode()).digest()
    return (unit * (length // 32 + 1))[:length]


def read(descriptor, length):
    if not args.direct:
        parts, offset = [], 0
        while part := os.pread(descriptor, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)
    buffer, parts, offset = mmap.mmap(-1, 1 << 20), [], 0
    while got := os.preadv(descriptor, [buffer], offset):
        parts.append(buffer[:got])
        offset += got
        if got < 1 << 20:
            break
    return b"".join(parts)


def judge(path, length, contents):
    return any(contents == expected(path, version, length) for version in range(args.versions))


def note(**changes):
    with lock:
        for key, value in changes.items():
            if key in ("longest",):
                status[key] = max(status[key], value)
            elif key == "first":
                status[key] = status[key] or value
            else:
                status[key] += value


def visit(path, descriptor=None):
    length = int(re.search(r"-(\d+)\.bin$", path).group(1))
    begin = time.monotonic()
    own = descriptor is None
    try:
        if own:
            descriptor = os.open(args.dir + path, os.O_RDONLY | (os.O_DIRECT if args.direct else 0))
        try:
            contents = read(descriptor, length)
        finally:
            if own:
                os.close(descriptor)
        if judge(path, length, contents):
            note(files=1, bytes=length, longest=time.monotonic() - begin)
        else:
            note(wrong=1, first=f"{path}: {len(contents)} bytes, expected {length}")
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOENT) and args.versions > 1:
            note(stale=1)
        else:
            note(errors=1, first=f"{path}: {error}")


def names():
    found = []
    for directory, _, files in os.walk(args.dir, onerror=lambda error: note(errors=1, first=str(error))):
        found += [directory[len(args.dir):].rstrip("/") + "/" + name for name in files if name.endswith(".bin")]
    return sorted(found)


def work(mine, seed):
    order = random.Random(seed)
    while not stop.is_set():
        order.shuffle(mine)
        for path in mine:
            if stop.is_set():
                return
            visit(path)
        note(passes=1)
        if not args.loop:
            return


def hold(mine):
    opened = []
    for path in mine:
        try:
            opened.append((path, os.open(args.dir + path, os.O_RDONLY)))
        except OSError as error:
            note(stale=1) if args.versions > 1 else note(errors=1, first=str(error))
    while not stop.is_set():
        for path, descriptor in opened:
            visit(path, descriptor)
        note(passes=1)
        time.sleep(0.01)


def save():
    with lock:
        text = json.dumps(status)
    with open("/tmp/status.new", "w") as out:
        out.write(text)
    os.rename("/tmp/status.new", "/tmp/status")


first_at = time.time()
paths = names()
if args.hold:
    threads = [threading.Thread(target=hold, args=(paths[i::16][:4],)) for i in range(16)]
else:
    threads = [threading.Thread(target=work, args=(paths[i::args.threads], i)) for i in range(args.threads)]
for thread in threads:
    thread.daemon = True
    thread.start()
while any(thread.is_alive() for thread in threads):
    save()
    time.sleep(0.2)
status["names"] = len(paths)
status["began"] = first_at
save()
print(json.dumps(status), flush=True)
sys.exit(0 if status["errors"] == 0 and status["wrong"] == 0 and (args.loop or status["files"] + status["stale"] == len(paths)) else 1)
