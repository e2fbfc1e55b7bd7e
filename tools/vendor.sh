#!/bin/bash
# Makes the release tarball, which contains the sources of all crates and is built without a network. The
# checkout is not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
into=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git archive --prefix=rustcluster/ HEAD | tar x -C "$work"
cd "$work/rustcluster/src/rust"
cargo vendor --locked --quiet vendor >/dev/null
cat >vendor-config.toml <<'TOML'
[source.crates-io]
replace-with = "vendored-sources"

[source.vendored-sources]
directory = "vendor"
TOML
# Check that the sources are complete: cargo uses nothing else.
mkdir .cargo
cp vendor-config.toml .cargo/config.toml
CARGO_HOME="$work/empty" cargo metadata --locked --offline --format-version 1 >/dev/null
rm -r .cargo
cargo metadata --locked --format-version 1 >"$work/metadata.json"
python3 - "$work/metadata.json" >"$work/rustcluster/inst/AUTHORS" <<'PYTHON'
import json, sys
print("The library contains these Rust crates, with their authors and licences:\n")
packages = json.load(open(sys.argv[1]))["packages"]
for package in sorted(packages, key=lambda package: (package["name"], package["version"])):
    if package["source"] is None:
        continue
    authors = ", ".join(package["authors"]) or "see " + (package["repository"] or "its page")
    print(f'{package["name"]} {package["version"]}: {authors}. {package["license"]}')
PYTHON
tar cJf vendor.tar.xz vendor
rm -rf vendor
cd "$work"
R CMD build rustcluster
mv rustcluster_*.tar.gz "$into/"
echo "made $(ls "$into"/rustcluster_*.tar.gz)"
