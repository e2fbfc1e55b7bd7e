#!/bin/bash
# Builds, tests and checks the package with the R and the Rust of another release of Debian, such as trixie (R
# 4.5) or forky (R 4.6). Run as root, on Debian:
#
#   tools/chroot.sh [--roots=DIR] [--mirror=URL] SUITE [build | check | TEST]...
#
# "build" runs R CMD INSTALL only; "check" runs R CMD check without the tests; TEST is one of the files in
# tests/testthat, as "nodes" for test-nodes.R. The default is all tests, then check. Makes the systems in DIR
# (default: roots, beside the checkout), once, and keeps them. Commands run in them with a PID and a network
# namespace of their own. RUSTCLUSTER_LONG_TESTS=1 runs the long tests, too.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh
. tools/roots.sh

take_options "$@"
suite= what=()
for argument in "${rest[@]}"; do
  case $argument in
    -*) usage ;;
    *) if [ -z "$suite" ]; then suite=$argument; else what+=("$argument"); fi ;;
  esac
done
[ -n "$suite" ] || usage
[ ${#what[@]} != 0 ] || what=(tests check)

take_root
need_packages iproute2 mmdebstrap
command -v cargo >/dev/null || need_packages cargo
root=$roots/$suite
make_root "$root" "$suite" "$(dpkg --print-architecture)" "$mirror" \
  r-base-core r-base-dev rustc cargo r-cran-cli r-cran-testthat
# Packages that tests and check use if they are installed.
add_packages "$root" r-cran-knitr r-cran-rmarkdown r-cran-parallelly pandoc qpdf procps bsdutils \
  mount iproute2 iptables openssh-server openssh-client xz-utils devscripts git r-cran-future r-cran-future.apply \
  r-cran-furrr r-cran-foreach r-cran-doparallel r-cran-dorng r-cran-snow r-cran-dosnow r-cran-pbapply r-cran-progressr \
  r-cran-later r-cran-promises r-cran-callr r-cran-boot
cargo fetch --quiet --locked --manifest-path src/rust/Cargo.toml
copy_checkout "$root/srv/rustcluster"
inside "$root" bash /srv/rustcluster/tools/on-root.sh "${what[@]}"
