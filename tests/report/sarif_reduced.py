"""A reduced schema of SARIF 2.1.0: the objects that our report is made of, and nothing else.

Written after section 3 of the standard, whose own schema (110 KB, of which we use a tenth) allows all that this one
allows. Where the file of the official one is at hand, ``SARIF_SCHEMA`` may name it, and reports are held against both.
"""

from __future__ import annotations

from typing import Any

LEVEL = {"enum": ["none", "note", "warning", "error"]}
BAG = {
    "type": "object",
    "properties": {"tags": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}},
}


def of(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def several(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "minItems": least, "items": items}


TEXT: dict[str, Any] = {"type": "string"}
MESSAGE = of("text", text=TEXT, markdown=TEXT)
PLACE = of("", uri={"type": "string", "format": "uri-reference"}, uriBaseId=TEXT)
REGION = of("startLine", startLine={"type": "integer", "minimum": 1})
LOCATION = of(
    "physicalLocation",
    physicalLocation=of("artifactLocation", artifactLocation=PLACE, region=REGION),
    logicalLocations=several(of("", fullyQualifiedName=TEXT, kind=TEXT)),
)
RULE = of(
    "id",
    id=TEXT,
    name=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    defaultConfiguration=of("", level=LEVEL),
    properties=BAG,
)
RESULT = of(
    "message",
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=LEVEL,
    message=MESSAGE,
    locations=several(LOCATION),
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    suppressions=several(of("kind", kind={"enum": ["inSource", "external"]}, justification=TEXT)),
)
INVOCATION = of(
    "executionSuccessful",
    executionSuccessful={"type": "boolean"},
    commandLine=TEXT,
    workingDirectory=PLACE,
    startTimeUtc={"type": "string", "format": "date-time"},
    toolExecutionNotifications=several(of("message", level=LEVEL, message=MESSAGE)),
)
RUN = of(
    "tool",
    tool=of("driver", driver=of("name", name=TEXT, version=TEXT, rules=several(RULE))),
    automationDetails=of("", id=TEXT),
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    originalUriBaseIds={"type": "object", "additionalProperties": PLACE},
    invocations=several(INVOCATION),
    results=several(RESULT),
)
SARIF = of("version runs", **{"$schema": TEXT}, version={"enum": ["2.1.0"]}, runs=several(RUN))

GITLAB = several(
    {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string", "minLength": 1},
            "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": of(
                "path lines",
                path={"type": "string", "pattern": "^(?!\\./)."},
                lines=of("begin", begin={"type": "integer", "minimum": 1}),
            ),
        },
    }
)
"""What https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format asks of each entry."""
