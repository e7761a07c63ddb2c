"""JSON schemas of what ``kuberay.yaml`` may say: fields and types of the ray.io/v1 API, KubeRay 1.5.1, and of pods.

Written by hand from the operator's API reference, restricted to the fields that such a manifest has a use for. Unknown
fields are refused, as the API server does with strict validation, so a misspelt one is noticed.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listing(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9.]+([EPTGMk]i?|m)?$"}]}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}

METADATA = record(("name",), name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
SECRET_KEY = record(("name", "key"), name=NAME, key=TEXT, optional=FLAG)
CONTAINER = record(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "Never", "IfNotPresent"]},
    command=listing(TEXT),
    args=listing(TEXT),
    env=listing(record(("name",), name=TEXT, value=TEXT, valueFrom=record(secretKeyRef=SECRET_KEY))),
    resources=record(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=listing(record(("name", "mountPath"), name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    ("name",),
    name=NAME,
    persistentVolumeClaim=record(("claimName",), claimName=NAME, readOnly=FLAG),
    configMap=record(("name",), name=NAME, optional=FLAG),
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = record(
    ("containers",),
    containers=listing(CONTAINER),
    volumes=listing(VOLUME),
    nodeSelector=TEXTS,
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
)
TEMPLATE = record(("spec",), metadata=record(labels=TEXTS, annotations=TEXTS), spec=POD)
HEAD = record(
    ("template",),
    rayStartParams=TEXTS,
    template=TEMPLATE,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=FLAG,
)
WORKERS = record(
    ("groupName", "template", "minReplicas", "maxReplicas"),
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
CLUSTER = record(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    suspend=FLAG,
    headGroupSpec=HEAD,
    workerGroupSpecs=listing(WORKERS),
)
JOB = record(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=record(backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    rayClusterSpec=CLUSTER,
)
SELECTOR = record(("matchLabels",), matchLabels=TEXTS)
PEER = record(podSelector=SELECTOR, namespaceSelector=SELECTOR)
PORT = record(("port",), port={"type": "integer", "minimum": 1, "maximum": 65535}, protocol={"enum": ["TCP", "UDP"]})
RULE = {"type": "object", "properties": {"from": listing(PEER), "ports": listing(PORT)}, "additionalProperties": False}
POLICY = record(
    ("podSelector", "policyTypes", "ingress"),
    podSelector=SELECTOR,
    policyTypes=listing({"enum": ["Ingress", "Egress"]}),
    ingress=listing(RULE),
)
KINDS: dict[str, Schema] = {
    kind: record(
        ("apiVersion", "kind", "metadata", *body),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        **body,
    )
    for kind, version, body in (
        ("RayJob", "ray.io/v1", {"spec": JOB}),
        ("NetworkPolicy", "networking.k8s.io/v1", {"spec": POLICY}),
        ("ConfigMap", "v1", {"data": TEXTS}),
    )
}
