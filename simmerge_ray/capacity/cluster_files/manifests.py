"""The fields of KubeRay's `ray.io/v1` resources that our manifests use, strictly: a misspelt one is an error.

A field that KubeRay has and this schema lacks is refused as well: it is for the files of `cluster/` and what users make
of them, and says which fields it knows. Kubernetes' own objects inside (probes, volumes, tolerations) are taken as they
are; the API server checks those. `kubectl apply --dry-run=server` compares a file with KubeRay's own schema, which has
ten thousand lines a kind and is not shipped here.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Free = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeyRef(_Strict):
    name: StrictStr
    key: StrictStr
    optional: StrictBool | None = None


class ValueFrom(_Strict):
    secretKeyRef: KeyRef | None = None
    configMapKeyRef: KeyRef | None = None
    fieldRef: Free | None = None


class Credential(_Strict):
    value: StrictStr | None = None
    valueFrom: ValueFrom | None = None


class Env(Credential):
    """A variable; in YAML a number needs quotes."""

    name: StrictStr


class Resources(_Strict):
    """Of a container; amounts as Kubernetes writes them."""

    requests: dict[str, StrictStr] = {}
    limits: dict[str, StrictStr] = {}


class Container(_Strict):
    name: StrictStr
    image: StrictStr
    imagePullPolicy: StrictStr | None = None
    command: list[StrictStr] | None = None
    args: list[StrictStr] | None = None
    env: list[Env] = []
    envFrom: list[Free] | None = None
    ports: list[Free] | None = None
    resources: Resources
    securityContext: Free = {}
    volumeMounts: list[Free] | None = None
    readinessProbe: Free | None = None
    livenessProbe: Free | None = None
    startupProbe: Free | None = None
    lifecycle: Free | None = None


class PodSpec(_Strict):
    containers: list[Container] = Field(min_length=1)
    initContainers: list[Container] | None = None
    serviceAccountName: StrictStr | None = None
    automountServiceAccountToken: StrictBool | None = None
    securityContext: Free | None = None
    terminationGracePeriodSeconds: StrictInt | None = None
    tolerations: list[Free] | None = None
    nodeSelector: dict[str, StrictStr] | None = None
    affinity: Free | None = None
    topologySpreadConstraints: list[Free] | None = None
    volumes: list[Free] | None = None
    restartPolicy: StrictStr | None = None
    imagePullSecrets: list[Free] | None = None
    priorityClassName: StrictStr | None = None


class Metadata(_Strict):
    name: StrictStr | None = None
    namespace: StrictStr | None = None
    labels: dict[str, StrictStr] | None = None
    annotations: dict[str, StrictStr] | None = None


class PodTemplate(_Strict):
    metadata: Metadata | None = None
    spec: PodSpec


class _Group(_Strict):
    rayStartParams: dict[str, StrictStr] = {}
    template: PodTemplate
    labels: dict[str, StrictStr] | None = None


class HeadGroup(_Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None


class WorkerGroup(_Group):
    groupName: StrictStr
    replicas: StrictInt = 0
    minReplicas: StrictInt = 0
    maxReplicas: StrictInt = 2**31 - 1
    numOfHosts: StrictInt = 1
    idleTimeoutSeconds: StrictInt | None = None
    priority: StrictInt | None = None


class AuthOptions(_Strict):
    mode: Literal["disabled", "token"]
    secretName: StrictStr | None = None
    enableK8sTokenAuth: StrictBool | None = None


class AutoscalerOptions(_Strict):
    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: StrictInt | None = None
    image: StrictStr | None = None
    imagePullPolicy: StrictStr | None = None
    env: list[Env] | None = None
    resources: Resources | None = None
    securityContext: Free | None = None


class FaultTolerance(_Strict):
    backend: Literal["redis", "rocksdb"] | None = None
    redisAddress: StrictStr | None = None
    redisUsername: Credential | None = None
    redisPassword: Credential | None = None
    externalStorageNamespace: StrictStr | None = None


class RayClusterSpec(_Strict):
    rayVersion: StrictStr
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: StrictBool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: FaultTolerance | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []
    suspend: StrictBool | None = None


class RayJobSpec(_Strict):
    """A job, on a cluster of its own or on one that is selected."""

    entrypoint: StrictStr
    clusterSelector: dict[str, StrictStr] | None = None
    rayClusterSpec: RayClusterSpec | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    runtimeEnvYAML: StrictStr | None = None
    backoffLimit: StrictInt | None = None
    activeDeadlineSeconds: StrictInt | None = None
    shutdownAfterJobFinishes: StrictBool | None = None
    ttlSecondsAfterFinished: StrictInt | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    submitterPodTemplate: PodTemplate | None = None


class RayServiceSpec(_Strict):
    serveConfigV2: StrictStr
    rayClusterConfig: RayClusterSpec
    serviceUnhealthySecondThreshold: StrictInt | None = None
    deploymentUnhealthySecondThreshold: StrictInt | None = None
    upgradeStrategy: Free | None = None


Spec = TypeVar("Spec", RayClusterSpec, RayJobSpec, RayServiceSpec)


class Resource(_Strict, Generic[Spec]):
    apiVersion: Literal["ray.io/v1"]
    kind: StrictStr
    metadata: Metadata
    spec: Spec


KINDS: dict[str, type[Resource[Any]]] = {
    "RayCluster": Resource[RayClusterSpec],
    "RayJob": Resource[RayJobSpec],
    "RayService": Resource[RayServiceSpec],
}
