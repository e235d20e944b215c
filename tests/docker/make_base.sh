#!/bin/sh
# Makes a base image for docker/ where no image can be pulled: a Debian root with a Python 3.12, and a CUDA compiler.
#
#   sh tests/docker/make_base.sh NAME PYTHON [CUDA]
#
# NAME    of the image, for --build-arg BASE_IMAGE=NAME or CUDA_IMAGE=NAME
# PYTHON  folder of a Python 3.12 (its bin, include and lib): becomes /usr/local
# CUDA    folder of a CUDA 13.0 toolkit (its bin, include, nvvm ...): becomes /usr/local/cuda. The image then also has
#         empty packages python3.12, -dev and -venv, which Ubuntu has and Debian 12 has not
#
# Run as root, on a machine with debootstrap and a Docker engine. Certificates are this machine's, so that a build
# behind the same gateway trusts what this machine trusts.
set -eu

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 python=$2 cuda=${3:-}
root=$(mktemp -d)
unset TMPDIR # a folder that the root does not have
trap 'rm -rf "$root"' EXIT

# The libraries are what a Python of Debian's usual build links to.
debootstrap --variant=minbase \
    --include=ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g \
    bookworm "$root"
cp -a "$python/bin" "$python/include" "$python/lib" "$root/usr/local/"
rm -rf "$root"/usr/local/lib/python3.12/site-packages/*
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
if [ -n "$cuda" ]; then
    mkdir "$root/usr/local/cuda"
    cp -a "$cuda/." "$root/usr/local/cuda/"
    for package in python3.12 python3.12-dev python3.12-venv; do
        mkdir -p "$root/tmp/$package/DEBIAN"
        printf 'Package: %s\nVersion: 3.12\nArchitecture: all\nMaintainer: none\nDescription: in /usr/local\n' \
            "$package" >"$root/tmp/$package/DEBIAN/control"
        chroot "$root" dpkg-deb --build "/tmp/$package" "/tmp/$package.deb"
        chroot "$root" dpkg --install "/tmp/$package.deb"
    done
    rm -rf "$root"/tmp/*
fi
chroot "$root" ldconfig
chroot "$root" python3.12 -m ensurepip
ln -sf python3.12 "$root/usr/local/bin/python"
ln -sf pip3.12 "$root/usr/local/bin/pip"
rm -rf "$root"/var/cache/apt/archives/*.deb
tar -C "$root" -c . | docker import - "$name"
