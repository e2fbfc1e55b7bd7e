# Sourced by chroot.sh, binary.sh and arm64.sh: makes Debian systems in folders, and runs commands in them.

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "tools/$(basename "$0")" >&2
  exit 2
}

# take_options ARGUMENT...: sets `roots`, `mirror` and, to the other arguments, `rest`.
take_options() {
  roots=$PWD/../roots mirror= rest=()
  local argument
  for argument in "$@"; do
    case $argument in
      --roots=?*) roots=${argument#*=} ;;
      --mirror=?*) mirror=${argument#*=} ;;
      *) rest+=("$argument") ;;
    esac
  done
}

# Makes the folder and finds a mirror, after the arguments have been checked.
take_root() {
  if [ "$(id -u)" != 0 ]; then
    echo "chroots take root" >&2
    exit 1
  fi
  mkdir -p "$roots"
  roots=$(realpath "$roots")
  mirror=${mirror:-$(default_mirror)}
}

# Makes this machine run programs for arm64.
need_arm64() {
  need_packages iproute2 mmdebstrap arch-test qemu-user-static binfmt-support
  command -v cargo >/dev/null || need_packages cargo
  # A container may not have this mounted.
  if ! [ -e /proc/sys/fs/binfmt_misc/register ]; then
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  fi
  [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64
}

# Prints the default mirror: the one that apt uses on this machine.
default_mirror() {
  apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' \
    'Label: Debian' 'Component: main' | head -n 1
}

# make_root DIR SUITE ARCH MIRROR PACKAGE...: makes a Debian in a folder, once. A changed list of packages makes
# it again.
make_root() {
  local dir=$1 suite=$2 arch=$3 mirror=$4
  shift 4
  local made="$suite $arch $*"
  if [ "$(cat "$dir.made" 2>/dev/null)" = "$made" ]; then return; fi
  echo "making $dir: Debian $suite for $arch"
  rm -rf --one-file-system "$dir" "$dir.made"
  local packages
  packages=$(IFS=,; echo "$*")
  # An expired mirror, such as a snapshot of the archive, is good enough.
  mmdebstrap --variant=apt --components=main --arch="$arch" --include="$packages" \
    --aptopt='Apt::Install-Recommends "false"' --aptopt='Acquire::Check-Valid-Until "false"' --skip=cleanup/apt/lists "$suite" "$dir" "$mirror" \
    >"$dir.log" 2>&1 || { tail -n 20 "$dir.log"; return 1; }
  echo "$made" >"$dir.made"
}

# Installs those of the packages that the suite in the folder has.
add_packages() {
  local dir=$1
  shift
  local there missing
  there=$(chroot "$dir" apt-cache --generate pkgnames | grep -Fx "$(printf '%s\n' "$@")" | sort)
  missing=$(comm -23 <(echo "$there") <(chroot "$dir" dpkg-query -W \
    -f '${db:Status-Abbrev} ${Package}\n' | sed -n 's/^ii *//p' | sort))
  if [ -z "$missing" ]; then return; fi
  echo "installing in $dir: "$missing
  cp -L /etc/resolv.conf "$dir/etc/resolv.conf"
  # shellcheck disable=SC2086
  chroot "$dir" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    $missing >"$dir.log" 2>&1 || { tail -n 20 "$dir.log"; return 1; }
}

# Copies the checkout with uncommitted changes, without ignored files. Compiled files of cargo in the copy stay.
copy_checkout() {
  local to=$1
  mkdir -p "$to/src/rust/target"
  mv "$to/src/rust/target" "$to.target"
  rm -rf "$to"
  mkdir -p "$to/src/rust"
  mv "$to.target" "$to/src/rust/target"
  git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'ls -d -- "$@" 2>/dev/null' sh |
    tar c -T - | tar x -C "$to"
}

# inside DIR COMMAND ARGUMENT...: runs a command in the system, with PID, mount and network namespaces of its
# own. No process is left at its end. The crates that this machine has fetched are available. The command does not
# inherit that SIGINT is ignored, as in the background of a shell: R 4.6 would keep that, and tests could not
# interrupt R.
inside() {
  local dir=$1 crates=${CARGO_HOME:-$HOME/.cargo}/registry
  shift
  mkdir -p "$dir/srv/.cargo/registry" "$crates"
  unshare --mount --pid --net --ipc --uts --fork --kill-child sh -euc '
    dir=$1 crates=$2
    shift 2
    mount --make-rprivate /
    # Commands such as "unshare --mount" need a root that is a mount.
    mount --bind "$dir" "$dir"
    ip link set lo up
    mount -t proc proc "$dir/proc"
    mount -t sysfs sys "$dir/sys"
    mount --rbind /sys/fs/cgroup "$dir/sys/fs/cgroup"
    mount --rbind /dev "$dir/dev"
    mount -t tmpfs tmp "$dir/tmp"
    mount -t tmpfs run "$dir/run"
    mount --bind "$crates" "$dir/srv/.cargo/registry"
    # A shell stays the first process, and reaps orphans. The processes after it have a process group of their
    # own namespace: in the group of this script, a signal to the group would reach the script.
    env -i --default-signal=INT HOME=/srv LANG=C.UTF-8 TZ=UTC PATH=/usr/sbin:/usr/bin:/sbin:/bin \
      CARGO_NET_OFFLINE=true NOT_CRAN=true RUSTCLUSTER_LONG_TESTS="${RUSTCLUSTER_LONG_TESTS:-}" \
      chroot "$dir" sh -c "setsid --wait \"\$@\"; exit \$?" sh "$@"
  ' sh "$dir" "$crates" "$@"
}
