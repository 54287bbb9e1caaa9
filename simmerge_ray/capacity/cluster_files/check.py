"""What is wrong with a file of the cluster launcher or of KubeRay, beyond what Ray's own checks find: plain rules, no
Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from simmerge_ray.base.errors import ConfigError, shown_value, unknown_name
from simmerge_ray.base.json_text import parse_json
from simmerge_ray.base.yaml_text import parse_yaml
from simmerge_ray.capacity import placement
from simmerge_ray.capacity.cluster_files import manifests
from simmerge_ray.capacity.machines import MACHINES
from simmerge_ray.capacity.placement import GPU_RESOURCES, GPU_SIZES, GPU_SIZES_MARK, Needs, gpu_offer, gpu_resource
from simmerge_ray.capacity.size import ModelSize

KNOWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory", GPU_SIZES_MARK, *GPU_RESOURCES)
MODELS_ANNOTATION = "simmerge/models"

_NODE_FIELDS = {
    "aws": (
        "InstanceType", "ImageId", "KeyName", "SubnetId", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile",
        "MetadataOptions", "InstanceMarketOptions", "BlockDeviceMappings", "TagSpecifications", "Placement",
        "EbsOptimized", "NetworkInterfaces", "CapacityReservationSpecification", "UserData", "Monitoring", "CpuOptions",
    ),
    "gcp": (
        "machineType", "disks", "serviceAccounts", "scheduling", "metadata", "guestAccelerators", "networkInterfaces",
        "shieldedInstanceConfig", "confidentialInstanceConfig", "labels", "tags", "minCpuPlatform", "canIpForward",
        "reservationAffinity", "sourceInstanceTemplate", "networkPerformanceConfig",
    ),
}  # fmt: skip
_SECRET_NAME = re.compile(r"(?i)(passw(or)?d|secret|token|api_?key|access_?key|credential)s?$")
_NO_SECRETS = ("HttpTokens",)
_SECURITY = {"runAsNonRoot": True, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{30}|hf_[A-Za-z0-9]{30}|://[^/\s:@]+:[^/\s:@$]+@|-----BEGIN"
)


def lint(content: Mapping[str, Any]) -> list[str]:
    """Problems of one document, each with the place and the rule; empty for one that is fine, or of another kind."""
    found = list(_secrets(content, ""))
    if "available_node_types" in content:
        return found + list(_launcher(content))
    if content.get("kind") == "Secret":
        found.append("kind Secret: make it with `kubectl create secret`, not in a file")
    if content.get("kind") not in manifests.KINDS:
        return found
    try:
        return found + list(_manifest(manifests.KINDS[content["kind"]].model_validate(content)))
    except ValidationError as error:
        return found + _problems(error)


def _problems(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]


def _secrets(value: Any, where: str) -> Iterator[str]:
    """Names and values that look like secrets in clear."""
    if isinstance(value, Mapping):
        named = value.get("name")
        if isinstance(named, str) and _SECRET_NAME.search(named) and isinstance(value.get("value"), str):
            yield f"{where}: the variable {named} has its value in the file; take it from a secret (valueFrom)"
        for key, one in value.items():
            place = f"{where}.{key}" if where else str(key)
            refers = isinstance(one, str) and one.startswith(("/", "~", "$"))
            if _SECRET_NAME.search(str(key)) and key not in _NO_SECRETS and isinstance(one, str) and not refers:
                yield f"{place}: a secret in the file; refer to one"
            yield from _secrets(one, place)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for number, one in enumerate(value):
            yield from _secrets(one, f"{where}[{number}]")
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        yield f"{where}: this looks like a secret in clear"


# Files of the cluster launcher.


def _launcher(content: Mapping[str, Any]) -> Iterator[str]:
    known = _NODE_FIELDS.get(str(content.get("provider", {}).get("type")))
    nodes: dict[str, Needs] = {}
    for name, kind in content["available_node_types"].items():
        where = f"available_node_types.{name}"
        is_head = name == content.get("head_node_type")
        least, most = kind.get("min_workers", 0), kind.get("max_workers", content.get("max_workers", 0))
        if not is_head and least > most:
            yield f"{where}: min_workers {least} is more than max_workers {most}"
        if not is_head and most == 0:
            yield f"{where}: max_workers is 0, so there will never be one"
        config, resources = kind.get("node_config", {}), kind.get("resources", {})
        for field in config:
            if known and field not in known:
                yield f"{where}.node_config: {unknown_name('field', field, known)}"
        nodes[name] = resources
        yield from _resources(resources, f"{where}.resources")
        yield from _machine(resources, config.get("InstanceType") or config.get("machineType"), where)
    head = nodes.get(content.get("head_node_type", ""), {})
    if head.get("CPU", 0) != 0:
        yield "the head takes work (CPU is not 0): when an actor takes its memory, the cluster ends"
    yield from _mark(head, [one for name, one in nodes.items() if name != content.get("head_node_type")])
    yield from _open_ray(content)
    yield from _models(content.get("metadata", {}).get("simmerge", {}).get("models", []), list(nodes.values()))


def _resources(resources: Mapping[str, Any], where: str) -> Iterator[str]:
    """Names that our actors ask for, and sizes of GPUs that belong together."""
    for name in resources:
        if name not in KNOWN_RESOURCES:
            yield f"{where}: {unknown_name('resource', name, KNOWN_RESOURCES)}"
    gpus = resources.get("GPU", 0)
    sizes = [size for size in GPU_SIZES if gpu_resource(size) in resources]
    offered = {name: count for name, count in resources.items() if name in GPU_RESOURCES}
    if gpus and not sizes:
        yield f"{where}: {gpus} GPUs, and no size; write {_written(gpu_offer(24, gpus))} for GPUs of 24 GB"
    elif sizes and offered != gpu_offer(max(sizes), gpus):
        yield f"{where}: GPUs of {max(sizes)} GB are written {_written(gpu_offer(max(sizes), gpus))}"


def _written(offer: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in offer.items()) or "without gpu_...: there is no GPU"


def _machine(resources: Mapping[str, Any], machine: str | None, where: str) -> Iterator[str]:
    """Not more than the machine has."""
    if machine not in MACHINES:
        return
    cpus, memory, gpus, size = MACHINES[machine]
    for name, amount in {"CPU": cpus, "memory": 1e9 * memory, "GPU": gpus}.items():
        if resources.get(name, 0) > amount:
            yield f"{where}.resources: {name} is {resources[name]:g}, {machine} has {amount:g}"
    offer = gpu_offer(size, gpus)
    for name in GPU_RESOURCES:
        if name in resources and name not in offer:
            yield f"{where}.resources: {name}, but the GPUs of {machine} have {size} GB"
        if name not in resources and name in offer:
            yield f"{where}.resources: the GPUs of {machine} have {size} GB; offer {name}, too"


def _mark(head: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if any(one.get("GPU", 0) for one in others) and not head.get(GPU_SIZES_MARK):
        yield f"the head must offer `{GPU_SIZES_MARK}: 1`, else jobs do not ask for sizes of GPUs that start from zero"


def _open_ray(content: Mapping[str, Any]) -> Iterator[str]:
    """Token authentication, and a dashboard that is not on the network."""
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        started = [one for one in content.get(field, []) if "ray start" in one]
        if not started:
            yield f"{field}: no `ray start`"
        elif not all("RAY_AUTH_MODE=token" in one for one in started):
            yield f"{field}: start Ray with RAY_AUTH_MODE=token; who reaches it can run code"
        if any("--dashboard-host=0.0.0.0" in one or "--dashboard-host 0.0.0.0" in one for one in started):
            yield f"{field}: the dashboard listens on all interfaces; use 127.0.0.1 and `ray dashboard`"
        if any("RAY_AUTH_TOKEN=" in one for one in content.get(field, [])):
            yield f"{field}: the token is in the file; mount ~/.ray/auth_token (file_mounts)"
    if not any(str(target).endswith("/.ray/auth_token") for target in content.get("file_mounts", {})):
        yield "file_mounts: the nodes get no token; mount ~/.ray/auth_token"


# KubeRay's.


def _manifest(resource: manifests.Resource[Any]) -> Iterator[str]:
    spec = resource.spec
    if isinstance(spec, manifests.RayJobSpec):
        if spec.submitterPodTemplate is not None:
            yield from _pod(spec.submitterPodTemplate.spec, "spec.submitterPodTemplate")
        if (spec.clusterSelector is None) == (spec.rayClusterSpec is None):
            yield "spec: a job needs either clusterSelector or rayClusterSpec"
        if spec.rayClusterSpec is not None:
            yield from _cluster(spec.rayClusterSpec, "spec.rayClusterSpec", [])
    elif isinstance(spec, manifests.RayServiceSpec):
        yield from _cluster(spec.rayClusterConfig, "spec.rayClusterConfig", [])
    else:
        annotations = resource.metadata.annotations or {}
        yield from _cluster(spec, "spec", _models_in(annotations.get(MODELS_ANNOTATION, "[]")))


def _models_in(text: str) -> list[Any]:
    found = parse_yaml(text)
    return found if isinstance(found, list) else []


def _cluster(spec: manifests.RayClusterSpec, where: str, models: Sequence[Any]) -> Iterator[str]:
    auth = spec.authOptions
    if auth is None or auth.mode != "token":
        yield f"{where}.authOptions: mode must be token; who reaches Ray can run code"
    elif not auth.secretName:
        yield f"{where}.authOptions: name the secret, else it is made anew with every cluster"
    fault = spec.gcsFaultToleranceOptions
    if fault is not None and fault.redisPassword is not None and fault.redisPassword.value is not None:
        yield f"{where}.gcsFaultToleranceOptions: the password is in the file; use valueFrom"
    head = spec.headGroupSpec
    if head.rayStartParams.get("num-cpus") != "0":
        yield f'{where}.headGroupSpec: rayStartParams need num-cpus: "0"; work on the head can end the cluster'
    if head.serviceType in ("NodePort", "LoadBalancer"):
        yield f"{where}.headGroupSpec: serviceType {head.serviceType} puts Ray on the network; use ClusterIP"
    yield from _pod(head.template.spec, f"{where}.headGroupSpec.template")
    groups: list[dict[str, float]] = []
    for number, group in enumerate(spec.workerGroupSpecs):
        place = f"{where}.workerGroupSpecs[{number}] ({group.groupName})"
        if not group.minReplicas <= group.replicas <= group.maxReplicas:
            limits = f"{group.minReplicas} to {group.maxReplicas}"
            yield f"{place}: replicas {group.replicas} is not within {limits} (minReplicas, maxReplicas)"
        yield from _pod(group.template.spec, f"{place}.template")
        try:
            groups.append(_offer_of_group(group))
        except (ValueError, TypeError) as error:
            yield f"{place}.rayStartParams.resources: {error}"
            continue
        yield from _resources(groups[-1], place)
    custom: dict[str, float] = {}
    try:
        custom = _custom(head.rayStartParams)
    except (ValueError, TypeError) as error:
        yield f"{where}.headGroupSpec.rayStartParams.resources: {error}"
    yield from _mark(custom, groups)
    yield from _models(models, groups)


def _pod(spec: manifests.PodSpec, where: str) -> Iterator[str]:
    for one in (*spec.containers, *(spec.initContainers or ())):
        yield from _container(one, f"{where}.{one.name}")


def _container(one: manifests.Container, where: str) -> Iterator[str]:
    for field, wanted in _SECURITY.items():
        if one.securityContext.get(field) is not wanted:
            yield f"{where}.securityContext: {field} must be {str(wanted).lower()}"
    requests, limits = one.resources.requests, one.resources.limits
    for name in ("cpu", "memory"):
        if name not in requests:
            yield f"{where}.resources: no request of {name}; Ray would count what the node has"
    asked, allowed = requests.get("memory"), limits.get("memory")
    if asked != allowed:
        yield f"{where}.resources: memory {asked} is requested, {allowed} allowed; make them equal"
    if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
        yield f"{where}.resources: as many nvidia.com/gpu must be requested as allowed"


def _custom(parameters: Mapping[str, str]) -> dict[str, float]:
    """`resources` of `ray start`, which KubeRay takes as JSON in quotes."""
    value = parse_json(parameters.get("resources", "{}"))
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"an object is needed, got {shown_value(value)}")
    return {str(name): float(amount) for name, amount in value.items()}


def _offer_of_group(group: manifests.WorkerGroup) -> dict[str, float]:
    limits = group.template.spec.containers[0].resources.limits
    offer = {"CPU": _amount(limits.get("cpu", "0")), "memory": 0.7 * _amount(limits.get("memory", "0"))}  # Ray's share
    if gpus := _amount(limits.get("nvidia.com/gpu", "0")):
        offer["GPU"] = gpus
    return offer | _custom(group.rayStartParams)


def _amount(text: str) -> float:
    """A quantity of Kubernetes."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    if match is None or (match[2] and match[2] not in units):
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * units.get(match[2], 1.0)


# Models.


def _models(given: Sequence[Any], nodes: Sequence[Needs]) -> Iterator[str]:
    """Each model fits: its engine on a node with GPUs, its signals on one of the nodes."""
    offered = {name for node in nodes for name in node} | {GPU_SIZES_MARK}
    for number, one in enumerate(given, 1):
        try:
            model = ModelSize.model_validate(one)
        except ValidationError as error:
            yield f"model {number}: {_problems(error)[0]}"
            continue
        try:
            needs = placement.engine_needs(model.engine_bytes, 1.0, 1.0, model.tensor_parallel, offered)
        except ConfigError as error:
            yield f"model {model.name}: an engine of {model.engine_bytes / 1e9:.1f} GB: {error}"
        else:
            if not any(placement.how_many_fit(needs, node) >= model.tensor_parallel for node in nodes):
                why = placement.missing_on(needs, nodes) or "no node has so many GPUs"
                ranks = f" in {model.tensor_parallel} ranks" if model.tensor_parallel > 1 else ""
                yield f"model {model.name}: no node holds an engine of {model.engine_bytes / 1e9:.1f} GB{ranks}: {why}"
        if missing := placement.missing_on(placement.signal_worker_needs(model.signal_worker_bytes, 0.0), nodes):
            yield (
                f"model {model.name}: no node holds a signal worker of {model.signal_worker_bytes / 1e9:.1f} GB: "
                f"{missing}; give memory_per_worker_gb (stages of layers), or larger nodes"
            )
