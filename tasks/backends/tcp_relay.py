"""A TCP relay on loopback that can break its connections: for servers that can't break their own. Part of a test double."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

_LINGER_0 = b"\1\0\0\0\0\0\0\0"  # close with a reset, not with an orderly end


class TcpRelay:
    """Carries bytes between callers on `port` and the server on 127.0.0.1:`to_port`."""

    def __init__(self, to_port: int) -> None:
        self._to = ("127.0.0.1", to_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}  # caller -> server
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]

    def start(self) -> None:
        self._threads[0].start()

    def drop(self) -> None:
        """Reset every connection that is open now; later ones are taken again."""
        with self._lock:
            for caller, server in self._pairs.items():
                with contextlib.suppress(OSError):
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
                    server.shutdown(socket.SHUT_RDWR)  # wakes the thread that carries; nothing more is delivered

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._threads[0].join()
        self._listener.close()
        self.drop()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._to)
            except OSError:  # closed
                return
            for each in (caller, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs[caller] = server
            thread = threading.Thread(target=self._carry, args=(caller, server))
            self._threads.append(thread)
            thread.start()

    def _carry(self, caller: socket.socket, server: socket.socket) -> None:
        other = {caller: server, server: caller}
        try:
            while True:
                for each in select.select([caller, server], [], [])[0]:
                    data = each.recv(65_536)
                    if not data:
                        return
                    other[each].sendall(data)
        except OSError:  # one side broke it
            pass
        finally:
            with self._lock:
                del self._pairs[caller]
            caller.close()
            server.close()
