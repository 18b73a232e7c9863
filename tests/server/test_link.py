"""The coordinator's link: who may speak to it, what about, and what becomes of messages when nodes die."""

from __future__ import annotations

import hashlib
import io
import secrets
import ssl
import threading
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPSConnection
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi.routing import iter_route_contexts
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import fab_to_proto, message_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.main import create_app

from confide.errors import ConfigError, PeerError
from confide.protocol.flower import to_records
from confide.server.fence import MAX_BODY, OPEN_PATHS
from confide.server.grid import LinkGrid
from confide.server.link import Link, LinkConfig, empty_bundle
from confide.server.nodes import node_keys
from tests.attacks.federation import open_federation
from tests.integration.deployed import LOOPBACK, wait_until, write_certificates
from tests.server.nodes import NodeClient, listening, new_key, public_line, status_of

ASH, BIRCH, STRANGER = new_key(), new_key(), new_key()
ELSEWHERE = "127.0.0.2"


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    """A link for two sites."""
    with listening(tmp_path, ash=ASH, birch=BIRCH) as made:
        yield made


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """Who vouches for it."""
    return tmp_path / "ca.pem"


def message_to(grid: LinkGrid, node: int, text: str = "hello") -> Message:
    """Something for a node."""
    return grid.create_message(RecordDict({"c": ConfigRecord({"text": text})}), "query.join", node, "join")


def text_of(message: Message) -> str:
    """What stands in it."""
    return str(message.content.config_records["c"]["text"])


def answer_to(message: Message, text: str = "fine") -> Message:
    """A node's reply."""
    return Message(RecordDict({"c": ConfigRecord({"text": text})}), reply_to=message)


def shown_key() -> str:
    """What a node with ASH's key shows of it."""
    return b64encode(node_keys({"ash": public_line(ASH)})["ash"]).decode()


def stock_paths() -> list[str]:
    """Every path that Flower's own service answers."""
    return sorted({str(context.route.path) for context in iter_route_contexts(create_app().routes)})


def start_a_run(address: str, ca: Path | None) -> int:
    """As `flwr run` does: submit a bundle; the run's number."""
    bundle = empty_bundle()
    fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    trusted = None if ca is None else ca.read_bytes()
    with ControlHttpClient.from_server_address(address, ca is None, trusted, [version]) as client:
        return int(client.StartRun(StartRunRequest(fab=fab, federation="")).run_id)


def take_a_task(address: str, ca: Path | None) -> str:
    """As an app process does: ask for work; the task's token."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    trusted = None if ca is None else ca.read_bytes()
    with RuntimeHttpClient.from_server_address(address, ca is None, trusted, [version]) as client:
        return str(client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token)


@contextmanager
def stock_service(host: str) -> Iterator[int]:
    """Flower's own service as it comes; its port."""
    server = uvicorn.Server(uvicorn.Config(create_app(), host=host, port=0, log_config=None, ws="none", loop="asyncio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the stock service listens")
    try:
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=20)


# --- who may speak ----------------------------------------------------------------------------------------------------


def test_a_node_of_the_roster_is_known_by_its_key(link: Link, ca: Path) -> None:
    node = NodeClient(link.port, ca, ASH).activate()
    assert link.sites[node.number] == "ash"
    assert link.online() == [node.number]


def test_a_node_with_an_unknown_key_is_refused(link: Link, ca: Path) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        NodeClient(link.port, ca, STRANGER).activate()
    assert status_of(refused.value) == 401
    assert link.online() == []


def test_showing_a_key_of_the_roster_is_not_having_it(link: Link, ca: Path) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        NodeClient(link.port, ca, STRANGER, shown=ASH).activate()
    assert status_of(refused.value) == 401
    assert link.online() == []


def test_a_node_cannot_speak_as_another_one(link: Link, ca: Path) -> None:
    ash, birch = NodeClient(link.port, ca, ASH).activate(), NodeClient(link.port, ca, BIRCH).activate()
    for call in (
        lambda: birch.client.PullMessages(PullMessagesRequest(node=Node(node_id=ash.number))),
        lambda: birch.client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=Node(node_id=ash.number), heartbeat_interval=30)
        ),
    ):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call()
        assert status_of(refused.value) == 401


def test_nobody_registers_a_node(link: Link, ca: Path) -> None:
    for key in (ASH, STRANGER):
        node = NodeClient(link.port, ca, key)
        with pytest.raises(httpx.HTTPStatusError) as refused:
            node.client.RegisterNode(RegisterNodeFleetRequest(public_key=node.key))
        assert status_of(refused.value) == 404


def test_a_client_that_does_not_know_the_authority_gets_no_connection(link: Link, tmp_path: Path) -> None:
    write_certificates(tmp_path / "other")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        NodeClient(link.port, tmp_path / "other" / "ca.pem", ASH).activate()


def test_there_is_no_plain_http(link: Link) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://{LOOPBACK}:{link.port}/v1/fleet/activate-node", timeout=5)


# --- what about -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [LOOPBACK, ELSEWHERE])
def test_runs_and_tasks_are_not_served_to_anybody(tmp_path: Path, host: str) -> None:
    with listening(tmp_path, host, ash=ASH) as link:
        LinkGrid(link)  # there is a run with a task to be had
        for attempt in (start_a_run, take_a_task):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                attempt(f"{host}:{link.port}", tmp_path / "ca.pem")
            assert status_of(refused.value) == 404


def test_the_stock_service_takes_a_run_and_gives_its_task_to_anybody() -> None:
    with stock_service(ELSEWHERE) as port:
        assert start_a_run(f"{ELSEWHERE}:{port}", None) > 0
        assert take_a_task(f"{ELSEWHERE}:{port}", None)


def test_of_all_that_flower_serves_only_what_nodes_need_is_there(link: Link, ca: Path) -> None:
    shown = {"flwr-public-key": shown_key(), "content-type": PROTOBUF_MEDIA_TYPE}
    paths = stock_paths()
    assert set(paths) > OPEN_PATHS
    with httpx.Client(
        base_url=f"https://{LOOPBACK}:{link.port}", verify=ssl.create_default_context(cafile=str(ca))
    ) as http:
        for path in paths:
            for method in ("GET", "POST", "PUT"):
                expected = 401 if path in OPEN_PATHS and method == "POST" else 404
                assert http.request(method, path, headers=shown).status_code == expected, (method, path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"flwr-public-key": "bm9uZQ=="}, 401),
        ({"flwr-public-key": "THE KEY", "transfer-encoding": "chunked"}, 411),
        ({"flwr-public-key": "THE KEY", "content-length": str(MAX_BODY + 1)}, 413),
        ({"flwr-public-key": "THE KEY", "content-length": "1" * 18}, 413),
        ({"flwr-public-key": "THE KEY"}, 411),
    ],
)
def test_a_request_is_refused_before_its_body_comes(link: Link, ca: Path, headers: dict[str, str], status: int) -> None:
    connection = HTTPSConnection(LOOPBACK, link.port, context=ssl.create_default_context(cafile=str(ca)), timeout=20)
    with closing(connection):
        connection.putrequest("POST", "/v1/fleet/push-object")
        for name, value in headers.items():
            connection.putheader(name, shown_key() if value == "THE KEY" else value)
        connection.endheaders()
        assert connection.getresponse().status == status  # though nothing of a body was ever sent


def test_the_bundle_that_nodes_are_given_holds_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(empty_bundle())) as bundle:
        assert {Path(name).suffix for name in bundle.namelist()} == {".toml"}
        assert sum(info.file_size for info in bundle.infolist()) < 2000


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_and_its_reply_arrive_whole_and_are_then_forgotten(link: Link, ca: Path) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    [name] = grid.push_messages([message_to(grid, node.number)])
    assert grid.pull_messages([name]) == []
    message = node.pull()
    assert text_of(message) == "hello"
    node.push(answer_to(message))
    [reply] = grid.pull_messages([name])
    assert (text_of(reply), reply.metadata.reply_to_message_id) == ("fine", name)
    assert grid.pull_messages([name]) == []
    assert not link._outstanding
    assert not link._state.message_ins_store
    assert not link._state.message_res_store
    assert not link._store.store


def test_half_a_reply_counts_for_nothing_and_does_not_stand_in_the_way_of_a_whole_one(link: Link, ca: Path) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    [name] = grid.push_messages([message_to(grid, node.number)])
    node.push(answer_to(node.pull(), "half"), leave_out=1)  # and here it dies
    assert grid.pull_messages([name]) == []
    node = NodeClient(link.port, ca, ASH).activate()
    assert grid.pull_messages([name]) == []
    node.push(answer_to(node.pull(), "whole"))
    assert [text_of(reply) for reply in grid.pull_messages([name])] == ["whole"]
    assert not link._store.store


def test_large_contents_travel_in_pieces(link: Link, ca: Path) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    data = secrets.token_bytes(12 * 2**20)
    [name] = grid.push_messages([message_to(grid, node.number)])
    message = node.pull()
    array = Array(dtype="uint8", shape=(len(data),), stype="test", data=data)
    node.push(Message(RecordDict({"a": ArrayRecord({"x": array})}), reply_to=message))
    [reply] = grid.pull_messages([name])
    assert reply.content.array_records["a"]["x"].data == data


def test_a_waiting_node_gets_a_message_at_once(link: Link, ca: Path) -> None:
    node, grid, got = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link), list[str]()
    waiting = threading.Thread(target=lambda: got.append(text_of(node.pull())), daemon=True)
    waiting.start()
    wait_until(lambda: link._state._requests[node.number] >= 2, "the node asks")
    grid.push_messages([message_to(grid, node.number)])
    waiting.join(timeout=8)  # less than a request is held: one request was enough
    assert got == ["hello"]


@pytest.mark.parametrize("restarts", [True, False])
def test_what_a_dead_node_took_is_handed_out_again_when_it_starts_anew(link: Link, ca: Path, restarts: bool) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    [name] = grid.push_messages([message_to(grid, node.number)])
    first = node.pull()
    if restarts:  # otherwise it is at work, and asking again for something to do changes nothing
        node = NodeClient(link.port, ca, ASH).activate()
    assert grid.pull_messages([name]) == []
    handed_out = link._state.message_ins_store[name].metadata.delivered_at != ""
    assert handed_out is not restarts
    if restarts:
        second = node.pull()
        assert (second.metadata.message_id, text_of(second)) == (first.metadata.message_id, "hello")
        node.push(answer_to(second))
        assert [text_of(reply) for reply in grid.pull_messages([name])] == ["fine"]


def test_a_request_of_a_dead_node_takes_nothing_from_its_successor(link: Link, ca: Path) -> None:
    dead, grid, got = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link), list[int]()

    def ask() -> None:
        got.append(len(dead.client.PullMessages(PullMessagesRequest(node=dead.node)).messages_list))

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    wait_until(lambda: link._state._requests[dead.number] >= 2, "the node asks")
    alive = NodeClient(link.port, ca, ASH).activate()
    grid.push_messages([message_to(grid, alive.number)])
    assert text_of(alive.pull()) == "hello"
    waiting.join(timeout=8)
    assert got == [0]


def test_a_node_that_stays_away_is_an_error_and_not_an_endless_wait(link: Link, ca: Path) -> None:
    grid = LinkGrid(link)
    [never_seen] = [node for node, site in link.sites.items() if site == "birch"]
    names = grid.push_messages([message_to(grid, never_seen)])
    assert grid.pull_messages(names) == []
    link._state.nodes[never_seen].online_until = 1.0  # its minute is over
    [reply] = grid.pull_messages(names)
    assert reply.has_error()
    with pytest.raises(PeerError, match="only 0 of at least 1"):
        grid.wait_for_nodes(1, 0.1)
    NodeClient(link.port, ca, ASH).activate()
    assert len(grid.wait_for_nodes(1, 5)) == 1
    with pytest.raises(PeerError, match="birch"):
        grid.wait_for_nodes(2, 0.1)


@pytest.mark.parametrize("own_node", [True, False])
def test_a_signed_reply_counts_only_from_its_signers_node(tmp_path: Path, own_node: bool) -> None:
    with (
        open_federation(tmp_path / "federation") as federation,
        listening(tmp_path, ash=ASH, birch=BIRCH) as link,
    ):
        grid, node = LinkGrid(link), NodeClient(link.port, tmp_path / "ca.pem", ASH if own_node else BIRCH).activate()
        signed = federation.join(["ash"])["ash"]
        names = grid.push_messages([message_to(grid, node.number)])
        node.push(Message(to_records(signed), reply_to=node.pull()))
        [reply] = grid.pull_messages(names)
        assert reply.has_error() is not own_node


def test_a_reply_that_is_no_message_ends_no_run(link: Link, ca: Path) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    names = grid.push_messages([message_to(grid, node.number)])
    reply = answer_to(node.pull())
    record = ConfigRecord({"x": 1})
    reply.metadata.__dict__["_message_id"] = record.object_id
    wire = message_to_proto(remove_content_from_message(reply))
    answer = node.client.PushMessages(
        PushMessagesRequest(
            node=node.node, messages_list=[wire], message_object_trees=[get_object_tree(record)],
            clientapp_runtime_list=[0.0],
        )
    )  # fmt: skip
    node.client.PushObject(
        PushObjectRequest(
            node=node.node, run_id=reply.metadata.run_id, session_id=answer.session_id, object_id=record.object_id,
            object_content=record.deflate(),
        )
    )  # fmt: skip
    [unreadable] = grid.pull_messages(names)
    assert unreadable.has_error()
    names = grid.push_messages([message_to(grid, node.number, "again")])  # the link goes on
    node.push(answer_to(node.pull()))
    assert [text_of(r) for r in grid.pull_messages(names)] == ["fine"]


def test_what_nobody_waits_for_any_more_is_not_handed_out_later(link: Link, ca: Path) -> None:
    node, grid = NodeClient(link.port, ca, ASH).activate(), LinkGrid(link)
    old, new = (grid.push_messages([message_to(grid, node.number, text)])[0] for text in ("old", "new"))
    message = node.pull()
    assert text_of(message) == "new"
    node.push(answer_to(message))
    assert [grid.pull_messages([old]), len(grid.pull_messages([new]))] == [[], 1]
    assert not link._store.store


def test_a_message_for_a_stranger_has_no_name_and_waits_for_nothing(link: Link) -> None:
    grid = LinkGrid(link)
    assert grid.push_messages([message_to(grid, 12345)]) == [""]
    assert list(grid.send_and_receive([message_to(grid, 12345)], timeout=5)) == []
    assert not link._outstanding


# --- what it is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"ash": "not a key"},
        {"ash": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ5o8g9qM3b1v0n1m3b3Yh0mZ8m5mJ5m3kq7Yw1m3k5m"},
        {"ash": public_line(ASH), "birch": public_line(ASH)},
        {"ash": ""},
    ],
)
def test_keys_that_cannot_be_used_are_named(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="node key of site"):
        node_keys(keys)


def test_a_node_keeps_its_number_when_the_link_is_started_again(tmp_path: Path) -> None:
    with listening(tmp_path, ash=ASH, birch=BIRCH) as first, listening(tmp_path, birch=BIRCH, ash=ASH) as second:
        assert dict(first.sites) == dict(second.sites)


def test_a_taken_port_and_a_bad_certificate_are_named(tmp_path: Path) -> None:
    with listening(tmp_path, ash=ASH) as link:
        config = LinkConfig(
            host=LOOPBACK, port=link.port, certificate=tmp_path / "server.pem", key=tmp_path / "server.key", nodes={}
        )
        with pytest.raises(ConfigError, match="cannot be listened on"), Link(config):
            pass
        with pytest.raises(ConfigError, match="cannot be used"), Link(replace(config, key=tmp_path / "ca.pem")):
            pass
        with pytest.raises(ConfigError, match="cannot be used"), Link(replace(config, key=tmp_path / "none.pem")):
            pass


def test_another_flower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confide.server.link.FLOWER", "0.0.1")
    with pytest.raises(ConfigError, match=r"needs flwr 0\.0\.1"), listening(tmp_path, ash=ASH):
        pass
