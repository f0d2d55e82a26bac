#!/usr/bin/env bash
# Installs what building, testing and the demo need and this machine lacks. Debian and its children; run again at will.
#
#   deploy/setup.sh build   to build and to run the demo
#   deploy/setup.sh test    to run the tests, too
#   deploy/setup.sh bench   to run the benchmarks, too (their peers)
#   deploy/setup.sh chaos   to run the chaos cases, too (their peer)
set -eu

case "${1:-build}" in
    build) want="build" ;;
    test) want="build test" ;;
    bench) want="build test bench" ;;
    chaos) want="build test chaos" ;;
    *) echo "setup.sh: \"$1\" is none of build, test, bench, chaos" >&2; exit 2 ;;
esac

# command or file that shows that the package is there | package | why
needs() {
    case "$1" in
        build) cat <<'TXT'
cc|gcc|compiles the C parts of dependencies
clang|clang|compiles the program of the kernel lanes for eBPF, which gcc does not
/usr/include/linux/bpf.h|linux-libc-dev|the kernel's own headers that it includes
protoc|protobuf-compiler|compiles the .proto files, ours and those of raft
/usr/include/google/protobuf/any.proto|libprotobuf-dev|the well-known types that they import
TXT
        ;;
        test) cat <<'TXT'
curl|curl|fetches through the VIP as a user would
ip|iproute2|renames an interface under a lane
TXT
        ;;
        bench) cat <<'TXT'
nft|nftables|a peer that the benchmarks compare with
haproxy|haproxy|a peer that the benchmarks compare with
TXT
        ;;
        chaos) cat <<'TXT'
nft|nftables|the forwarding of the peer that is compared with
keepalived|keepalived|the peer: VRRP
conntrackd|conntrackd|the peer: its standby's copy of the flows
conntrack|conntrack|empties the peer's table of flows when its machine loses power
TXT
        ;;
    esac
}

missing=""
for group in $want; do
    while IFS='|' read -r probe package why; do
        case "$probe" in
            /*) [ -e "$probe" ] && continue ;;
            *) PATH="$PATH:/usr/sbin:/sbin" command -v "$probe" >/dev/null 2>&1 && continue ;;
        esac
        echo "setup: $package is missing ($why)"
        missing="$missing $package"
    done <<TXT
$(needs "$group")
TXT
done

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: no apt-get here: install these with your package manager and try again:$missing" >&2
        exit 1
    fi
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 || { echo "setup: neither root nor sudo: install as root:$missing" >&2; exit 1; }
        sudo="sudo"
    fi
    export DEBIAN_FRONTEND=noninteractive
    $sudo apt-get update -qq
    # shellcheck disable=SC2086  # a list of words
    $sudo apt-get install -y -qq --no-install-recommends $missing
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: cargo is missing: install Rust from https://rustup.rs (rust-toolchain.toml names the version)" >&2
    exit 1
fi
