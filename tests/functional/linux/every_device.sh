# Every device of a machine with two CPUs, under the kernel's own drivers: a line each. The test on the host does its part
# when it has read the line before.

say() { echo "$*" > /dev/ttyS0; }
check() { if "$@" 2> /tmp/error; then say "check $1 ok"; else say "check $1 FAIL $(tr '\n' ';' < /tmp/error)"; fi; }
# Up to 20 seconds, until the rest of the words succeed.
until_it() { n=0; until "$@"; do n=$((n + 1)); [ $n -lt 100 ] || return 1; sleep 0.2; done; }
is() { [ "$1" = "$2" ] || { echo "$1 is not $2" >&2; return 1; }; }
fresh() { echo 3 > /proc/sys/vm/drop_caches; }
# A drive by its serial number.
drive() { for d in /sys/block/vd*; do [ "$(cat $d/serial)" = $1 ] && echo ${d##*/}; done; return 0; }

transport() {
    case $expected in
    pci) ls /sys/bus/pci/drivers/virtio-pci | grep -q ^0000: && grep -q 'PCI-MSI.*virtio' /proc/interrupts && ! ls /sys/bus/platform/drivers/virtio-mmio | grep -q LNRO ;;
    mmio) ls /sys/bus/platform/drivers/virtio-mmio | grep -q LNRO ;;
    esac
}

# The root device: on a partition that the kernel finds by its UUID.
partuuid() {
    grep -q 'root=PARTUUID=ca5e3a7e-01 rw' /proc/cmdline || return 1
    # The kernel's own search, as of a root without an initrd.
    echo PARTUUID=ca5e3a7e-01 > /sys/power/resume 2> /dev/null
    is "$(cat /sys/power/resume)" "$(cat /sys/class/block/vda1/dev)" && is "$(cat /sys/block/vda/serial)" root
}

# io_uring, and a queue for each CPU.
block_queues() {
    is "$(ls /sys/block/vda/mq | wc -l)" 2 || return 1
    for cpu in 1 2; do
        at=$((9 + cpu))
        dd if=/dev/urandom of=/tmp/written bs=64k count=8
        taskset $cpu dd if=/tmp/written of=/dev/vda bs=64k seek=$((at * 16)) oflag=direct conv=fsync
        fresh
        taskset $cpu dd if=/dev/vda of=/tmp/read bs=64k count=8 skip=$((at * 16)) iflag=direct
        cmp /tmp/written /tmp/read || return 1
    done
    mount -t ext4 /dev/vda1 /mnt && is "$(cat /mnt/hello)" "root of it" && echo changed > /mnt/new && umount /mnt
}

# What is written stays in a layer of 1 MiB; beyond that are errors.
block_layer() {
    d=/dev/$(drive layer)
    printf 'over it' | dd of=$d bs=512 conv=sync,fsync,notrunc
    fresh
    is "$(head -c 7 $d)" "over it" || return 1
    dd if=/dev/zero of=$d bs=64k seek=1 count=64 oflag=direct 2> /tmp/full && return 1
    grep -E 'No space|I/O error|Input/output' /tmp/full > /dev/null || { cat /tmp/full >&2; return 1; }
    fresh
    is "$(head -c 7 $d)" "over it"
}

# Another file, twice as large, while the guest runs.
block_replaced() {
    d=$(drive other)
    is "$(cat /sys/block/$d/size)" 2048 && is "$(head -c 5 /dev/$d)" first || return 1
    say replace
    until_it grep -q 4096 /sys/block/$d/size && fresh && is "$(head -c 6 /dev/$d)" second
}

# A disk of another process's.
vhost_user_block() {
    is "$(cat /sys/block/vdd/size)" 2048 || return 1
    is "$(head -c 5 /dev/vdd)" daemo && printf answer | dd of=/dev/vdd bs=512 seek=7 conv=sync,fsync,notrunc
}

vhost_user_fs() {
    mount -t virtiofs host /mnt && is "$(cat /mnt/hello)" hi && echo answer > /mnt/answer && umount /mnt
}

net_config() {
    cd /sys/class/net/eth0 && is "$(cat address)" 06:00:ac:10:00:02 && is "$(cat mtu)" 1400 &&
        is "$(ls -d queues/rx-* queues/tx-* | wc -l)" 4
}

# The host sends back what it gets, by both queues. The guest gives its kernel all at once, which makes segments that are larger
# than the network's packets.
net_tcp() {
    ip link set eth0 up && ip address add 10.99.0.2/24 dev eth0 || return 1
    head -c 200000 /dev/urandom > /tmp/sent
    printf '#!/bin/sh\ndd if=/tmp/sent bs=200000 count=1 2> /dev/null &\nhead -c 200000 > /tmp/back\n' > /bin/client
    chmod 755 /bin/client
    for cpu in 1 2; do
        rm -f /tmp/back
        say listen $cpu
        until_it eval "taskset $cpu nc 10.99.0.1 800$cpu -e /bin/client; [ -s /tmp/back ]" || return 1
        cmp /tmp/sent /tmp/back || return 1
    done
}

# Version 2 on PCI: for those with a token. Version 1 on MMIO: for all.
mmds() {
    ip route add 169.254.169.254 dev eth0
    url=http://169.254.169.254/latest/name
    case $expected in
    mmio) is "$(wget -q -O - $url)" keep ;;
    pci)
        token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n' | nc -w 5 169.254.169.254 80 | tail -n 1)
        is "$(wget -q -O - --header "X-metadata-token: $token" $url)" keep && ! wget -q -O - $url 2> /dev/null
        ;;
    esac
}

entropy() { is "$(cut -d . -f 1 /sys/class/misc/hw_random/rng_current)" virtio_rng && is "$(head -c 32 /dev/hwrng | wc -c)" 32; }

# The guest serves the host, and calls it.
vsock() {
    casemate-guest-tool serve 52 20 > /tmp/serving 2> /tmp/error & server=$!
    until_it grep -q serving /tmp/serving && say serving && wait $server || { cat /tmp/error >&2; return 1; }
    say calling && casemate-guest-tool call 1024 20
}

# Files of the host's in the guest's memory, without copies.
pmem() {
    mount -t ext4 -o dax=always /dev/pmem0 /mnt && grep -q 'pmem0.*dax' /proc/mounts || return 1
    is "$(cat /mnt/hello)" "root of it" && echo 'written by DAX' > /mnt/new && sync && umount /mnt
}

identity() { ls -d /sys/bus/acpi/devices/VMGENCTR:00 /sys/bus/acpi/devices/AMZNC10C:00 > /dev/null; }

total() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
# The host takes 16 MiB, and gives them back.
balloon() {
    first=$(total)
    say "balloon now"
    until_it eval 'is $(total) $((first - 16))' && say "balloon back" && until_it eval 'is $(total) $first'
}

# Both ways; and the host's terminal gets another size.
console() {
    exec 3<> /dev/hvc0
    # Once all is said on the serial port.
    stty -F /dev/ttyS0 -echo && stty -F /dev/hvc0 -echo || return 1
    echo 'console: hello' >&3
    read line <&3
    is "$line" "typed on the host" && say resize && until_it eval 'stty -F /dev/hvc0 size | grep -q "30 90"'
}

check transport
check partuuid
check block_queues
check block_layer
check block_replaced
check vhost_user_block
check vhost_user_fs
check net_config
check net_tcp
check mmds
check entropy
check vsock
check pmem
check identity
check balloon
check console
read line <&3
poweroff -f
