#!/bin/bash
# Builds, tests and checks the package with the R and the Rust of another release of Debian, such as
# trixie (R 4.5) or forky (R 4.6). As root, on Debian:
#
#   tools/chroot.sh [--roots=DIR] [--mirror=URL] SUITE [build | check | TEST]...
#
# "build": no more than R CMD INSTALL; "check": R CMD check without the tests; TEST: one of the files in
# tests/testthat, as "nodes" for test-nodes.R. Without any: all tests, then check. The systems are made
# in DIR (default: roots, beside the checkout), once, and kept; what runs in them has processes and a
# network of its own. RUSTCLUSTER_LONG_TESTS=1 runs the long tests, too.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh
. tools/roots.sh

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

roots=$PWD/../roots mirror= suite= what=()
for argument in "$@"; do
  case $argument in
    --roots=?*) roots=${argument#*=} ;;
    --mirror=?*) mirror=${argument#*=} ;;
    -*) usage ;;
    *) if [ -z "$suite" ]; then suite=$argument; else what+=("$argument"); fi ;;
  esac
done
[ -n "$suite" ] || usage
[ ${#what[@]} != 0 ] || what=(tests check)
if [ "$(id -u)" != 0 ]; then
  echo "chroots take root" >&2
  exit 1
fi

need_packages iproute2 mmdebstrap
command -v cargo >/dev/null || need_packages cargo
mkdir -p "$roots"
root=$(realpath "$roots")/$suite
make_root "$root" "$suite" "$(dpkg --print-architecture)" "${mirror:-$(default_mirror)}" \
  r-base-core r-base-dev rustc cargo r-cran-cli r-cran-testthat
# What tests and check use where it is there.
add_packages "$root" r-cran-knitr r-cran-rmarkdown r-cran-parallelly pandoc qpdf procps bsdutils \
  mount iproute2 iptables openssh-server openssh-client xz-utils devscripts git r-cran-future r-cran-future.apply \
  r-cran-furrr r-cran-foreach r-cran-doparallel r-cran-dorng r-cran-pbapply r-cran-progressr \
  r-cran-later r-cran-promises r-cran-callr r-cran-boot
cargo fetch --quiet --locked --manifest-path src/rust/Cargo.toml
copy_checkout "$root/root/rustcluster"
inside "$root" bash /root/rustcluster/tools/on-root.sh "${what[@]}"
