#!/bin/sh
# The only process the kernel starts: makes the ground, runs what /t/steps lists, switches off.
export PATH=/bin LD_LIBRARY_PATH=/lib/x86_64-linux-gnu
# an emulated machine is slow
export DATAPLANE_TIMEOUT_FACTOR=10
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
mkdir -p /run/netns /dev/shm
echo 3 > /proc/sys/kernel/printk
for module in $(cat /t/modules); do insmod "$module" || echo "MODULE $module is refused"; done
ip link set lo up
cd /t || poweroff -f
while read -r seconds name command; do
    echo "BEGIN $name"
    timeout "$seconds" $command < /dev/null 2>&1
    echo "END $name $?"
done < /t/steps
echo "DONE"
poweroff -f
