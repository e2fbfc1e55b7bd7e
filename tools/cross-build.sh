#!/bin/bash
# arm64.sh runs this script in the system that compiles. It makes the binary package, beside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# Replaces R's own settings: the compiler, its flags, some of which are for this architecture, and the R library
# to link with. The library finds R's functions in the process that loads it.
export MAKEFLAGS="CC=aarch64-linux-gnu-gcc CFLAGS=-O2 LIBR="
library=/tmp/library
mkdir "$library"
R CMD INSTALL --no-test-load --library="$library" . >/tmp/install.log 2>&1 ||
  { cat /tmp/install.log; exit 1; }

# R for arm64 loads the package only if this says for which architecture it was built.
Rscript --vanilla - "$library/rustcluster" <<'R'
package <- commandArgs(TRUE)
platform <- "aarch64-unknown-linux-gnu"
meta <- file.path(package, "Meta", "package.rds")
about <- readRDS(meta)
built <- about$Built$Platform
about$Built$Platform <- platform
about$DESCRIPTION[["Built"]] <- sub(built, platform, about$DESCRIPTION[["Built"]], fixed = TRUE)
saveRDS(about, meta)
description <- file.path(package, "DESCRIPTION")
writeLines(sub(built, platform, readLines(description), fixed = TRUE), description)
R
version=$(sed -n 's/^Version: //p' DESCRIPTION)
tar czf "/srv/rustcluster_${version}_R_aarch64.tar.gz" -C "$library" rustcluster
