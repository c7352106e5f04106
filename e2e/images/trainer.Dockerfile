# What tests read with: Python and coreutils (sha256sum, cat, dd, cp, find).
FROM debian:12-slim
RUN apt-get update -qq && \
    apt-get install -qq --yes --no-install-recommends python3 >/dev/null && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*
CMD ["sleep", "infinity"]
