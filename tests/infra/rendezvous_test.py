"""Processes that meet, as threads; that no crash follows is in faults_test.py."""

import concurrent.futures
import socket
import threading
import time

import pytest

from pfjax.infra import rendezvous


@pytest.fixture
def port():
    """A port that is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _meet(port, *numbers, num=None, seconds=20.0, host="localhost"):
    """What each of the numbered processes is told: nothing, or its error."""
    num = num or len(numbers)

    def one(index):
        try:
            place = rendezvous.Place(host, port, num, index)
            return rendezvous.meet(place, seconds)
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("node-1:80", "node-1", 80), ("[::1]:65535", "::1", 65535)],
)
def test_addresses_are_read_and_written(address, host, port):
    assert rendezvous.parse_address(address) == (host, port)
    assert rendezvous.Place(host, port, 1, 0).address == address


@pytest.mark.parametrize("address", ["node1", "node1:", ":80", "a:0", "a:65536", "::1"])
def test_addresses_without_host_or_port_are_refused(address):
    with pytest.raises(ValueError, match="has to be host:port"):
        rendezvous.parse_address(address)


def test_all_go_on_once_all_have_come_and_the_port_is_free(port):
    first = threading.Timer(1.0, _meet, (port, 0), {"num": 4})
    first.start()  # The others are refused until it listens.
    assert _meet(port, 3, 1, 2, num=4) == [None] * 3
    first.join()
    socket.create_server(("localhost", port)).close()


def test_one_process_waits_for_no_one():
    assert _meet(1, 0, host="no.such.host.invalid") == [None]


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("no.such.host.invalid", "the host no.such.host.invalid is unknown"),
        ("localhost", "nothing listens there (closed port)"),
    ],
)
def test_who_cannot_reach_the_first_says_why(port, host, says):
    (told,) = _meet(port, 1, num=2, seconds=1.0, host=host)
    assert told.startswith(f"the first process was not reached at {host}:{port} in 1 s")
    assert says in told


def test_a_port_that_is_taken_is_said_by_the_first_and_by_the_others():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        first, second = _meet(port, 0, 1, seconds=1.0)
    assert f"cannot listen at port {port}: Address already in use, for 1 s" in first
    assert "is it another program?" in second


def test_a_port_that_the_run_before_still_holds_is_waited_for(port):
    before = socket.create_server(("", port))
    threading.Timer(1.0, before.close).start()
    assert _meet(port, 0, 1) == [None, None]


def test_another_program_that_answers_is_no_first_process():
    with socket.create_server(("localhost", 0)) as server:

        def greet():
            while True:
                try:
                    with server.accept()[0] as caller:
                        caller.sendall(b"SSH-2.0\r\n")
                except OSError:
                    return

        threading.Thread(target=greet, daemon=True).start()
        (told,) = _meet(server.getsockname()[1], 1, num=2, seconds=1.0)
        server.shutdown(socket.SHUT_RDWR)
    assert "another program listens there" in told


def test_all_are_told_who_is_missing(port):
    first, second = _meet(port, 0, 2, num=12, seconds=2.0)
    assert first == second
    assert "10 of 12 processes did not come" in first
    assert "in 2 s: number 1, 3, 4, 5, 6, 7, 8, 9, ... (from 0)" in first


def _listens(port):
    try:
        socket.create_connection(("localhost", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_one_that_ends_while_it_waits_is_missing_and_strangers_are_passed_over(port):
    first = concurrent.futures.ThreadPoolExecutor(1).submit(
        _meet, port, 0, num=3, seconds=3.0
    )
    while not _listens(port):
        time.sleep(0.01)
    for words in (b"pfjax 1 of 3\n", b"GET / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(("localhost", port)) as caller:
            caller.sendall(words)
    silent = socket.create_connection(("localhost", port))
    assert "number 1 (from 0)" in _meet(port, 2, num=3, seconds=4.0)[0]
    assert "1 of 3 processes did not come" in first.result()[0]
    silent.close()


def test_numbers_that_do_not_fit_are_told_at_once(port):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(_meet, port, 0, num=3)
        ones = {pool.submit(_meet, port, 1, num=3) for _ in range(2)}
        told, waits = concurrent.futures.wait(ones, return_when="FIRST_COMPLETED")
        assert told.pop().result() == ["two processes were started as number 1"]
        assert _meet(port, 1, num=2) == [
            "process 1 was started as one of 2, the first as one of 3"
        ]
        assert _meet(port, 2, num=3) == [None]
        assert first.result() == waits.pop().result() == [None]
