#!/bin/bash
# Runs what needs several memory nodes on an emulated machine of two CPUs for each: tests/nodes.sh [NODES [COMMAND ...]]
#
# QEMU boots Debian's kernel (apt-get download), sees this machine's files, read-only, and keeps what it writes in memory, but for
# /mnt, where temporary files go: a disk with ext4. Needs packages qemu-system-x86, busybox-static, cpio, e2fsprogs; no rights, no KVM. Emulation: it
# tells where pages lie, not how fast they are.
set -euo pipefail

nodes=${1:-2}
shift || true
repository=$(cd "$(dirname "$0")/.." && pwd)
python=$repository/.venv/bin/python
if [ $# = 0 ]; then set -- "$python" -m pytest -q -rs -p no:cacheprovider tests/kernels/test_memory_nodes.py; fi
work=$repository/build/nodes
PATH=$PATH:/usr/sbin:/sbin
for tool in qemu-system-x86_64 busybox cpio mkfs.ext4 dpkg-deb apt-get; do
  command -v "$tool" > /dev/null || { echo "nodes.sh: no $tool; hint: apt-get install qemu-system-x86 busybox-static cpio e2fsprogs" >&2; exit 1; }
done
mkdir -p "$work"
cd "$work"

if [ ! -d kernel ]; then
  package=$(apt-cache depends linux-image-amd64 2> /dev/null | grep -o 'linux-image-[0-9][^ ]*' | head -1 || true)
  [ "$package" ] || { echo "nodes.sh: no package linux-image-amd64; hint: apt-get update, on Debian" >&2; exit 1; }
  apt-get download "$package"
  dpkg-deb -x "$package"_*.deb kernel.partial
  mv kernel.partial kernel
fi

rm -rf root
mkdir -p root/{bin,dev,host,modules,new,proc,rw,sys}
cp "$(command -v busybox)" root/bin/busybox
modules="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci 9pnet 9pnet_virtio netfs fscache 9p overlay
  virtio_blk crc16 mbcache jbd2 crc32c_generic ext4"
for module in $modules; do cp "$(find kernel -name "$module.ko")" root/modules/; done
cat > root/init << EOF
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(echo $modules); do insmod /modules/\$module.ko; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /host
mount -t tmpfs -o size=80% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /new
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir /new/dev/shm
mount -t tmpfs shm /new/dev/shm
mount -t ext4 /dev/vda /new/mnt
chroot /new /bin/bash $work/guest.sh < /dev/null
echo "status \$?"
poweroff -f
EOF
chmod +x root/init
{
  printf 'export TMPDIR=/mnt HOME=%q PATH=%q FIDDLER_MEMORY_NODES=%q\ncd %q\n' "$HOME" "$PATH" "$nodes" "$repository"
  printf '%q ' "$@"
} > guest.sh
(cd root && find . | cpio --quiet -o -H newc) | gzip > root.gz

rm -f disk
truncate -s 2G disk
mkfs.ext4 -q disk

# Compiling takes an emulated machine minutes; what is in the cache it finds there.
FIDDLER_CACHE=$repository/build/test-cache PYTHONPATH=$repository/tests "$python" "$repository/tests/kernels/test_memory_nodes.py"

machine=(-smp $((2 * nodes)) -m 8G)
for ((node = 0; node < nodes; ++node)); do
  machine+=(-object "memory-backend-ram,id=m$node,size=$((8192 / nodes))M"
    -numa "node,nodeid=$node,memdev=m$node,cpus=$((2 * node))-$((2 * node + 1))")
done
# With the processor's own clock the CPUs of an emulated machine wait for each other for ever.
timeout 1800 qemu-system-x86_64 -accel tcg,thread=multi -cpu max "${machine[@]}" -kernel kernel/boot/vmlinuz-* -initrd root.gz \
  -append "console=ttyS0 quiet panic=-1 nowatchdog tsc=unstable clocksource=acpi_pm nohz=off" \
  -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
  -drive file=disk,format=raw,if=virtio,cache=unsafe \
  -nographic -no-reboot -nic none < /dev/null | tee log
grep -q "^status 0" log
