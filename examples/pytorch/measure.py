"""Samples per second of a DataLoader over a directory, with and without hints.

    python3 examples/pytorch/measure.py /data [--workers 4] [--batch 64] [--epochs 2] [--plain]

Each epoch reads every file below the directory once, in a new random order. `--plain` tells nothing.
"""

import argparse
import os
import time

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from forebay_sampler import HintedSampler


class Files(Dataset):
    """The bytes of files, as numbers of bytes: what a decoder would make of them is not measured."""

    def __init__(self, directory, names):
        self.directory, self.names = directory, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        with open(os.path.join(self.directory, self.names[index]), "rb") as file:
            return len(file.read())


def names_below(directory):
    found = []
    for parent, _, files in os.walk(directory):
        found.extend(os.path.relpath(os.path.join(parent, file), directory) for file in files)
    return sorted(found)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory")
    arguments.add_argument("--workers", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--plain", action="store_true")
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    dataset = Files(options.directory, names_below(options.directory))
    sampler = RandomSampler(dataset)
    if not options.plain:
        sampler = HintedSampler(sampler, options.directory, dataset.names)
    loader = DataLoader(dataset, batch_size=options.batch, sampler=sampler, num_workers=options.workers)
    for epoch in range(options.epochs):
        start, size, samples = time.monotonic(), 0, 0
        for batch in loader:
            size += int(batch.sum())
            samples += len(batch)
        took = time.monotonic() - start
        print(f"epoch {epoch}: {samples} samples, {size} bytes, {samples / took:.0f} samples/s, {size / took / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
