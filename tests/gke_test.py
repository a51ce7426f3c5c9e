"""The manifest for GKE: by JobSet's schema, and by what its parts mean for each other."""

import copy
import pathlib
import re

import jsonschema
import pytest
import yaml

from pfjax.infra import distributed
from pfjax.trainer import preemption

TESTS = pathlib.Path(__file__).parent


def _closed(schema):
    """The schema, by which fields that it does not have are mistakes, as kubectl has it."""
    if isinstance(schema, list):
        return [_closed(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema and not is_open:
        schema = {"additionalProperties": False} | schema
    return {k: _closed(v) for k, v in schema.items()}


SCHEMA = _closed(yaml.safe_load((TESTS / "jobset_crd.yaml").read_text()))


@pytest.fixture
def manifest():
    return yaml.safe_load((TESTS.parent / "launch/gke.yaml").read_text())


def _job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def _pod(manifest):
    return _job(manifest)["template"]["spec"]


def test_the_manifest_is_valid(manifest):
    jsonschema.validate(manifest, SCHEMA)


def _without_name(manifest):
    del manifest["spec"]["failurePolicy"]["rules"][0]["name"]


def _without_status(manifest):
    rule = _job(manifest)["podFailurePolicy"]["rules"][0]
    del rule["onPodConditions"][0]["status"]


def _with_a_truth(manifest):
    rule = _job(manifest)["podFailurePolicy"]["rules"][0]
    rule["onPodConditions"][0]["status"] = True


def _with_a_misspelt_field(manifest):
    _pod(manifest)["containers"][0]["envFroms"] = []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_name, "'name' is a required property"),
        (_without_status, "'status' is a required property"),
        (_with_a_truth, "True is not of type 'string'"),
        (_with_a_misspelt_field, "'envFroms' was unexpected"),
    ],
)
def test_what_the_api_server_refuses_is_noticed(manifest, spoil, says):
    spoiled = copy.deepcopy(manifest)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError, match=says):
        jsonschema.validate(spoiled, SCHEMA)


def test_there_is_a_pod_for_each_host_of_the_slice(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    job, pod = _job(manifest), _pod(manifest)
    (container,) = pod["containers"]
    select = pod["nodeSelector"]
    assert select["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    chips = 1
    for side in select["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    a_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == a_host
    assert job["parallelism"] == job["completions"] == chips // a_host > 1
    assert job["completionMode"] == "Indexed"
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert "--multihost" in container["args"]
    # Where JAX's first process listens on TPUs.
    assert {"containerPort": 8482} in container["ports"]


def _action(job, status, conditions=()):
    """What the job controller does about a pod that ended with a status."""
    for rule in job["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            asked = [(x["type"], x["status"]) for x in rule["onPodConditions"]]
            is_met = any(x in conditions for x in asked)
        else:
            codes = rule["onExitCodes"]
            is_met = (status in codes["values"]) == (codes["operator"] == "In")
        if is_met:
            return rule["action"]
    return "Count"


def test_only_mistakes_are_final(manifest):
    job = _job(manifest)
    disrupted = [("DisruptionTarget", "True")]
    # A failure that counts is one of the job, which starts it again.
    assert job["backoffLimit"] == 0 and _pod(manifest)["restartPolicy"] == "Never"
    for status in (1, 2):
        assert _action(job, status) == "FailJob"
        assert _action(job, status, disrupted) == "Count"
    # Has saved; lost another host; segmentation fault; killed; told too early.
    for status in (preemption.EXIT_STATUS, distributed.LOST_STATUS, 134, 139, 137, 143):
        assert _action(job, status) == "Count"
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    # What the controllers refuse beyond the schema.
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    codes = job["podFailurePolicy"]["rules"][1]["onExitCodes"]
    assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
    assert codes["containerName"] == _pod(manifest)["containers"][0]["name"]


def test_checkpoints_do_not_depend_on_a_grace_that_spot_nodes_do_not_give(manifest):
    (container,) = _pod(manifest)["containers"]
    (often,) = [x for x in container["args"] if x.startswith("--config.checkpoint_ev")]
    assert 0 < int(often.partition("=")[2]) <= 10
    assert _pod(manifest)["terminationGracePeriodSeconds"] >= 30


def test_variables_come_from_a_secret_that_need_not_be(manifest):
    (container,) = _pod(manifest)["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "pfjax", "optional": True}}]
    about = (TESTS.parent / "launch/gke.yaml").read_text()
    assert "kubectl create secret generic pfjax --from-env-file=" in about
