"""Makes a Unix socket reachable by TCP, for clients that know nothing else. Bytes pass as they are."""

import socket
import socketserver
import threading


def _pump(source, sink):
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # One side has gone: so does the other.
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def forward(path):
    """Returns the URL under which the socket at `path` is served until the program ends."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.socket(socket.AF_UNIX) as inner:
                inner.connect(path)
                back = threading.Thread(target=_pump, args=(inner, self.request), daemon=True)
                back.start()
                _pump(self.request, inner)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"
