# A training job: PyTorch with its data loaders, built for CPUs.
FROM debian:12-slim
RUN apt-get update -qq && \
    apt-get install -qq --yes --no-install-recommends python3 python3-torch python3-torchvision >/dev/null && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*
CMD ["sleep", "infinity"]
