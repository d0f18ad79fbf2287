"""Brings a restored machine's memory page by page, as a program that knows Firecracker's handshake and nothing of Casemate.

usage: page_handler.py SOCKET MEMORY_FILE [full|silent|refuse]

It says `listening`, then `mapped` and the message that it was sent, then each range that was given back. Once there is a
file SOCKET.stall it brings no more pages, and says `stalled` for each that somebody waits for.
"""

import array
import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import sys

UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
PAGEFAULT, REMOVE = 0x12, 0x15
MESSAGE = struct.Struct("<B7x3Q")


def copy(uffd, target, data):
    """Puts the bytes there. False if somebody has to read events first."""
    source = ctypes.create_string_buffer(data, len(data))
    request = array.array("Q", [target, ctypes.addressof(source), len(data), 0, 0])
    try:
        fcntl.ioctl(uffd, UFFDIO_COPY, request, True)
    except BlockingIOError:
        return False
    except FileExistsError:
        pass
    return True


def zero(uffd, target, length):
    request = array.array("Q", [target, length, 0, 0])
    try:
        fcntl.ioctl(uffd, UFFDIO_ZEROPAGE, request, True)
    except BlockingIOError:
        return False
    except FileExistsError:
        pass
    return True


def main():
    path, memory, how = sys.argv[1], open(sys.argv[2], "rb"), (sys.argv[3:] or ["full"])[0]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen()
    print("listening", flush=True)
    connection, _ = listener.accept()
    message, descriptors, _, _ = socket.recv_fds(connection, 1024, 1)
    uffd = descriptors[0]
    regions = json.loads(message)
    print("mapped", message.decode(), flush=True)
    if how == "refuse":
        return
    gone = set()
    waiting = []
    while True:
        poll = select.poll()
        poll.register(uffd, select.POLLIN)
        poll.register(connection, 0)
        for descriptor, _ in poll.poll():
            if descriptor == connection.fileno():
                return
        while True:
            try:
                bytes_read = os.read(uffd, MESSAGE.size)
            except BlockingIOError:
                break
            event, first, second, _ = MESSAGE.unpack(bytes_read)
            if event == PAGEFAULT and os.path.exists(path + ".stall"):
                print("stalled", flush=True)
            elif event == PAGEFAULT:
                waiting.append(second)
            elif event == REMOVE:
                print("removed", first, second, flush=True)
                gone.update(range(first, second, 4096))
        if how == "silent":
            continue
        left = []
        for address in waiting:
            for region in regions:
                size = region["page_size"]
                start = region["base_host_virt_addr"]
                at = address - address % size
                if not start <= at < start + region["size"]:
                    continue
                if at in gone:
                    done = zero(uffd, at, size)
                else:
                    memory.seek(region["offset"] + at - start)
                    done = copy(uffd, at, memory.read(size))
                if not done:
                    left.append(address)
        waiting = left


main()
