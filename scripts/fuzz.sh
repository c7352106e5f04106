#!/usr/bin/env bash
# Fuzzes every decoder for SECONDS_EACH (default 60) with libFuzzer, built by the stable compiler with LLVM's coverage
# instrumentation. Corpora grow in target/fuzz/corpus; a finding is left in target/fuzz/findings and fails the run.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
# The host's build scripts and macros must not be instrumented: --target keeps their flags apart.
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"

RUSTFLAGS="$flags" CARGO_TARGET_DIR=target/fuzz \
  cargo build --manifest-path fuzz/Cargo.toml --release --target "$host" --bins --quiet

mkdir -p target/fuzz/findings
for source in fuzz/targets/*.rs; do
  name=$(basename "$source" .rs)
  corpus="target/fuzz/corpus/$name"
  mkdir -p "$corpus"
  echo "fuzzing $name for ${seconds}s"
  "target/fuzz/$host/release/$name" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -max_len=8192 \
    -artifact_prefix="target/fuzz/findings/$name-" -print_final_stats=1 "$corpus" 2>&1 |
    grep -E "^(stat::number_of_executed_units|stat::new_units_added|==|SUMMARY|.*panicked|.*ERROR)" ||
    { echo "fuzzing $name failed; see target/fuzz/findings" >&2; exit 1; }
done
ls target/fuzz/findings | grep . && { echo "findings in target/fuzz/findings" >&2; exit 1; }
echo "no findings"
