"""A PyTorch sampler that tells Forebay which files come next, so that they are there when they are read.

    dataset = Images("/data/train", names)               # names: paths below the directory, by index
    sampler = HintedSampler(RandomSampler(dataset), "/data/train", names)
    loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=4)

The order is told by one ioctl on the directory, as often as something is to be told: no SDK, no extra process, and it works
on read-only mounts. On anything but a Forebay mount the sampler is the one that it wraps.
"""

import errno
import fcntl
import os

from torch.utils.data import Sampler

# _IOW(0xFB, 1, char[N]) of asm-generic/ioctl.h
_WRITE, _TYPE, _NUMBER, _LARGEST = 1, 0xFB, 1, 16383


def hint(directory, names):
    """Tells the mount of `directory` (a descriptor) that these files below it will be read, in this order.

    Gives how many it took, from the first on: where that is not all of them, say the others again later. Paths that begin
    with "/" count from the root of the mount. Raises OSError; ENOTTY says that it is no mount of Forebay.
    """
    taken = 0
    while taken < len(names):
        told, count = bytearray(), 0
        for name in names[taken:]:
            path = os.fsencode(name) + b"\0"
            if len(told) + len(path) > _LARGEST:
                break
            told += path
            count += 1
        if count == 0:
            raise ValueError(f"a path of more than {_LARGEST} bytes")
        # A bytearray, because Python limits what cannot be changed to 1,024 bytes.
        now = fcntl.ioctl(directory, _WRITE << 30 | len(told) << 16 | _TYPE << 8 | _NUMBER, told, True)
        taken += now
        if now < count:
            break
    return taken


class HintedSampler(Sampler):
    """Gives the indices of another sampler, and tells the mount of `directory` about the next `ahead` of them.

    `names[i]` is the path of sample i below `directory`, or a list of paths where a sample is made of several files.
    """

    def __init__(self, sampler, directory, names, ahead=4096):
        self.sampler, self.directory, self.names, self.ahead = sampler, directory, names, ahead

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        order = list(self.sampler)
        told = 0
        try:
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            descriptor = None
        try:
            for position, index in enumerate(order):
                # In good portions: half of what is told was not told before.
                if descriptor is not None and told < len(order) and position + self.ahead // 2 >= told:
                    upcoming = order[told : position + self.ahead]
                    if not self._tell(descriptor, upcoming):
                        os.close(descriptor)
                        descriptor = None
                    told += len(upcoming)
                yield index
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _tell(self, descriptor, indices):
        """Whether it makes sense to go on telling."""
        paths = []
        for index in indices:
            name = self.names[index]
            paths.extend([name] if isinstance(name, (str, bytes, os.PathLike)) else name)
        try:
            # What it does not take is read without having been told.
            hint(descriptor, paths)
        except OSError as error:
            return error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP)
        return True
