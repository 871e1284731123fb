"""The fields of KubeRay's RayJob (ray.io/v1) that the recipe uses, with their types; any other field is refused.

KubeRay publishes its schema only as a resource of a cluster. Where that is at hand, VECTORCLM_CRDS names its folder.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr


class Strict(BaseModel):
    """A mapping without other keys; names in YAML are in camel case."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    """Who may talk to the cluster."""

    mode: Literal["disabled", "token"]
    secretName: StrictStr


class Group(Strict):
    """The pods of the head."""

    rayStartParams: dict[StrictStr, StrictStr]
    template: dict[StrictStr, Any]  # a pod template, which Kubernetes' own schema judges


class WorkerGroup(Group):
    """Pods of workers."""

    groupName: StrictStr
    replicas: StrictInt
    minReplicas: StrictInt
    maxReplicas: StrictInt


class RayClusterSpec(Strict):
    """A cluster."""

    rayVersion: StrictStr
    authOptions: AuthOptions
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class RayJobSpec(Strict):
    """A job and its cluster."""

    entrypoint: StrictStr
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    backoffLimit: StrictInt
    shutdownAfterJobFinishes: StrictBool
    ttlSecondsAfterFinished: StrictInt
    rayClusterSpec: RayClusterSpec


class Metadata(Strict):
    """The name of a resource."""

    name: StrictStr
    namespace: StrictStr
    labels: dict[StrictStr, StrictStr] = {}


class RayJob(Strict):
    """The resource."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
