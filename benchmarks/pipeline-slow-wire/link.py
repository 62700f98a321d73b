"""A wire with delay and bandwidth: carries Ethernet frames between two interfaces, in both directions.

    python link.py INTERFACE INTERFACE --delay MILLISECONDS --rate MBIT_PER_SECOND

Replaces `tc netem` if the kernel does not have it. Frames are taken as they are, unsegmented, with the header in which
the kernel notes checksums and segments that are still to be made (virtio_net_hdr), so few of them pass. None is lost.
"""

import argparse
import queue
import socket
import struct
import threading
import time

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 15, 23, 3
HEADER = 10


def opened(interface: str) -> socket.socket:
    """A raw socket that receives what arrives at the interface, but not what it sends itself."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, struct.pack("i", 1))
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, struct.pack("i", 1))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 25)
    end.bind((interface, ETH_P_ALL))
    return end


def carry(source: socket.socket, target: socket.socket, delay: float, rate: float) -> None:
    """Two threads: one notes when each frame is due, the other waits until then."""
    frames: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def receive() -> None:
        free = 0.0
        while True:
            frame = source.recv(1 << 17)
            free = max(free, time.monotonic()) + (len(frame) - HEADER) / rate
            frames.put((free + delay, frame))

    def send() -> None:
        while True:
            due, frame = frames.get()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            while True:
                try:
                    target.send(frame)
                    break
                except BlockingIOError:  # the interface's queue is full for a moment
                    time.sleep(1e-4)
                except OSError as reason:
                    if reason.errno != 105:  # ENOBUFS, the same
                        raise
                    time.sleep(1e-4)

    for work in (receive, send):
        threading.Thread(target=work, daemon=True).start()


def main() -> None:
    """Carry until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("interfaces", nargs=2)
    parser.add_argument("--delay", type=float, required=True, help="milliseconds, one way")
    parser.add_argument("--rate", type=float, required=True, help="Mbit/s in each direction")
    given = parser.parse_args()
    one, two = map(opened, given.interfaces)
    for source, target in ((one, two), (two, one)):
        carry(source, target, given.delay / 1e3, given.rate * 1e6 / 8)
    print("carrying", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
