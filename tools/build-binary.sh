#!/bin/bash
# binary.sh runs this script where the package is compiled: on this machine, or in the system that cross-compiles.
# Makes the binary package in a folder. Arguments: the folder; "arm64" to cross-compile.
set -euo pipefail
into=$1 arch=${2:-}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The package must run on other processors than that of this machine: no settings of the user reach the compilers,
# and R's own flags are replaced. What `make` has as an argument overrides every makefile.
# shellcheck disable=SC2046
unset $(compgen -e | grep -E 'C(PP)?FLAGS|LDFLAGS|RUSTFLAGS|^CARGO_(BUILD_TARGET|PROFILE_|TARGET_)' || true)
export R_MAKEVARS_USER=/dev/null R_MAKEVARS_SITE=/dev/null MAKEFLAGS="CFLAGS=-O2" R_KEEP_PKG_SOURCE=no
options=() platform=''
if [ "$arch" = arm64 ]; then
  options=(--no-test-load) platform=aarch64-unknown-linux-gnu
  export CARGO_BUILD_TARGET=$platform CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
  # The R library of this system is for another architecture: an empty one with its name is linked instead. Some
  # compilers leave out libraries that have nothing to use.
  aarch64-linux-gnu-gcc -shared -Wl,-soname,libR.so -x c /dev/null -o "$work/libR.so"
  MAKEFLAGS+=" CC=aarch64-linux-gnu-gcc LIBR=-Wl,--no-as-needed,$work/libR.so"
fi
mkdir "$work/library"
R CMD INSTALL --preclean --clean "${options[@]}" --library="$work/library" . >"$work/install.log" 2>&1 ||
  { cat "$work/install.log" >&2; exit 1; }

# R loads the package only on the platform for which it says that it was built.
package=$(Rscript --vanilla - "$work/library/rustcluster" "$platform" <<'R'
arguments <- commandArgs(TRUE)
meta <- file.path(arguments[[1]], "Meta", "package.rds")
about <- readRDS(meta)
built <- about$Built$Platform
if (nzchar(arguments[[2]])) {
  about$Built$Platform <- arguments[[2]]
  about$DESCRIPTION[["Built"]] <- sub(built, arguments[[2]], about$DESCRIPTION[["Built"]], fixed = TRUE)
  saveRDS(about, meta)
  description <- file.path(arguments[[1]], "DESCRIPTION")
  writeLines(sub(built, arguments[[2]], readLines(description), fixed = TRUE), description)
}
cat("rustcluster_", about$DESCRIPTION[["Version"]], "_R", format(getRversion()[, 1:2]), "_", about$Built$Platform,
    ".tar.gz", sep = "")
R
)
tar czf "$into/$package" --owner=root:0 --group=root:0 -C "$work/library" rustcluster
