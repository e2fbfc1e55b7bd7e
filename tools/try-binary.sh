#!/bin/bash
# binary.sh runs this script, on this machine or in an emulated system: installs a binary package into a temporary
# library, where no compiler is found, and computes with two workers. Argument: the package.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/library"
IFS=: read -ra dirs <<<"$PATH"
for dir in "${dirs[@]}"; do
  ln -s "$dir"/* "$work/bin/" 2>/dev/null || true
done
rm -f "$work"/bin/{cargo,rustc,gcc,g++,cc,c++,make}
export PATH="$work/bin" R_LIBS="$work/library"
R CMD INSTALL --library="$work/library" "$1" >"$work/install.log" 2>&1 || { cat "$work/install.log" >&2; exit 1; }
Rscript --vanilla - <<'R'
suppressPackageStartupMessages(library(rustcluster))
stopifnot(startsWith(find.package("rustcluster"), Sys.getenv("R_LIBS")),
          nzchar(system.file("source", "rustcluster.tar.gz", package = "rustcluster")))
cl <- makeRustCluster(2)
stopifnot(identical(parSapply(cl, 1:4, function(i) i^2), c(1, 4, 9, 16)))
stopCluster(cl)
R
