"""The other questions, and how failures of the controller come out."""

from __future__ import annotations

import logging

import msgspec
import pytest

from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import ModelInfo, WorkerInfo

MODEL = ModelInfo("m", "weights", "config", "", 256, "00ff")
WORKER = WorkerInfo("a", 1, "10.0.0.7", 8001, None, 100.5, 200.5, True, (MODEL,))
EVERY_QUESTION = [
    ("/lookup", {"tokens": [1]}),
    ("/health", {"instance_id": "a"}),
    ("/query_worker_info", {"instance_id": "a"}),
    ("/query_instance", {"ip": "10.0.0.7"}),
    ("/pin", {"instance_id": "a", "location": "ram", "tokens": [1]}),
    ("/compress", {"instance_id": "a", "location": "ram", "method": "cachegen"}),
    ("/check_finish", {"event_id": "e1"}),
]


async def test_health_gives_the_error_code_of_each_worker(client, controller):
    controller.matches, controller.codes = {"a": []}, {0: 0, 1: 5}
    status, reply = await client.post("/health", {"instance_id": "a"})
    assert (status, reply["error_codes"]) == (200, {"0": 0, "1": 5})
    assert reply["event_id"]


async def test_health_of_an_unknown_instance_is_404_and_lists_the_known_ones(client, controller):
    controller.matches = {"a": [], "b": []}
    assert await client.error("/health", {"instance_id": "c"}) == (
        404,
        "unknown_instance",
        "unknown instance 'c'",
        "Known: a, b",
    )


async def test_a_long_list_of_known_instances_is_cut(client, controller):
    controller.matches = {f"instance-{i}": [] for i in range(1000)}
    _, _, _, hint = await client.error("/health", {"instance_id": "c"})
    assert hint.endswith("instance-19 and 980 more")


async def test_an_unknown_instance_while_none_is_known_says_what_may_be_missing(client):
    _, _, _, hint = await client.error("/health", {"instance_id": "c"})
    assert "enable_controller: true" in hint


async def test_worker_info_has_the_fields_that_lmcache_has_and_the_models(client, controller):
    controller.infos = [WORKER]
    status, reply = await client.post("/query_worker_info", {"instance_id": "a"})
    assert status == 200
    assert reply["event_id"]
    assert reply["worker_infos"] == [
        {
            "instance_id": "a",
            "worker_id": 1,
            "ip": "10.0.0.7",
            "port": 8001,
            "peer_init_url": None,
            "registration_time": 100.5,
            "last_heartbeat_time": 200.5,
            "alive": True,
            "models": [msgspec.to_builtins(MODEL)],
        }
    ]


async def test_worker_info_passes_on_which_instance_and_workers(client, controller):
    await client.post("/query_worker_info", {"instance_id": "a", "worker_ids": [0, 3]})
    await client.post("/query_worker_info", {"instance_id": "all"})
    assert controller.worker_queries == [("a", [0, 3]), (None, None)]


async def test_query_instance_sends_the_event_back_and_names_the_instance(client):
    asked = {"event_id": "mine", "ip": "10.0.0.7"}
    assert await client.post("/query_instance", asked) == (
        200,
        {"event_id": "mine", "res": "here", "instances": ["here"]},
    )


async def test_query_instance_names_all_instances_of_an_address(client):
    status, reply = await client.post("/query_instance", {"ip": "gpu-1"})
    assert (status, reply["res"], reply["instances"]) == (200, "b", ["b", "a"])


async def test_query_instance_answers_null_when_nobody_registered_from_there(client):
    status, reply = await client.post("/query_instance", {"ip": "10.9.9.9"})
    assert (status, reply["res"], reply["instances"]) == (200, None, [])
    assert len(reply["event_id"]) == 32


async def test_healthz_answers_to_get_and_head(client):
    assert await client.send("GET", "/healthz") == (200, {"status": "ok"})
    assert await client.send("HEAD", "/healthz") == (200, None)


@pytest.mark.parametrize(("path", "body"), EVERY_QUESTION)
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (UnknownName("worker", "7", ["0"]), 404, "unknown_worker"),
        (NoWorker("nobody answers for 'a'", hint="Start it"), 503, "no_worker"),
        (OperationFailed("no memory", hint="Its log"), 502, "operation_failed"),
        (DeadlineExceeded("no answer within 2 s", hint="Try again"), 504, "deadline_exceeded"),
        (InvalidQuery("tokens[0] is odd", hint="Even ones"), 422, "invalid_request"),
        (ControlError("busy", hint="Wait"), 409, "conflict"),
    ],
)
async def test_a_refusal_of_the_controller_has_its_status(
    client, controller, path, body, failure, status, code
):
    controller.failure = failure
    given, shown, message, _ = await client.error(path, body)
    assert (given, shown, message) == (status, code, failure.message)


@pytest.mark.parametrize(("path", "body"), EVERY_QUESTION)
async def test_our_own_defect_is_logged_and_nothing_of_it_shown(
    client, controller, caplog, path, body
):
    controller.failure = ZeroDivisionError("the secret is 42")
    with caplog.at_level(logging.ERROR):
        status, code, message, hint = await client.error(path, body)
    assert (status, code) == (500, "internal_error")
    assert "secret" not in message + hint
    reference = hint.split()[-1]
    assert reference in caplog.text
    assert "the secret is 42" in caplog.text


async def test_an_operation_that_hangs_is_given_up(serve, controller):
    controller.matches, controller.wait_s = {"a": []}, 60
    client = await serve(request_timeout_s=0.05)
    status, code, message, _ = await client.error("/health", {"instance_id": "a"})
    assert (status, code) == (504, "deadline_exceeded")
    assert message == "the operation did not finish in time"
