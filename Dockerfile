# All images of Forebay:
#   docker build --target forebay -t forebay .                     workers, FUSE daemons and the command line
#   docker build --target forebay-operator -t forebay-operator .
#   docker build --target forebay-csi -t forebay-csi .
# The last stages take the binaries from the stage `builder`, or, with --build-arg BINARIES=context, from a build context
# that holds nothing but the binaries and ca-certificates.crt (as e2e/images.sh does).
ARG BINARIES=builder

FROM rust:1.95-slim-bookworm AS builder
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --package forebay --package forebay-operator --package forebay-csi && \
    mkdir /out && \
    for b in forebay forebay-operator forebay-csi; do objcopy --strip-debug target/release/$b /out/$b; done && \
    cp /etc/ssl/certs/ca-certificates.crt /out/

FROM scratch AS context
COPY . /out/

FROM ${BINARIES} AS binaries

# No package is installed on top of it: nothing to fetch, and nothing that differs from one build to the next.
FROM debian:12-slim AS base
COPY --from=binaries /out/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
LABEL org.opencontainers.image.source="https://github.com/forebay/forebay" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM base AS forebay-operator
COPY --from=binaries /out/forebay-operator /usr/local/bin/forebay-operator
USER 10001:10001
ENTRYPOINT ["forebay-operator"]

# The node plugin mounts: the one container that runs as root. It calls mount(2) itself and needs no fusermount.
FROM base AS forebay-csi
COPY --from=binaries /out/forebay-csi /usr/local/bin/forebay-csi
ENTRYPOINT ["forebay-csi"]

# `forebay worker`, `forebay fuse`, and every other command. Last, so that it is what a build without --target makes.
FROM base AS forebay
COPY --from=binaries /out/forebay /usr/local/bin/forebay
USER 10001:10001
ENTRYPOINT ["forebay"]
