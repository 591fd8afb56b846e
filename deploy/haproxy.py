"""Run the real HAProxy on a configuration made safe; RAY_SERVE_HAPROXY_BINARY_PATH names a script that runs this.

    python haproxy.py HOST REAL_BINARY [haproxy's own arguments, among them -f FILE]

Serve writes the configuration anew before every start; what it writes binds the statistics and metrics pages to every
interface, lets every user of the machine steer the proxy, logs each request to a syslog port, and answers in plain text
when no gateway is up. Serve itself is told to stay on loopback, so the public door is moved to HOST here, and nothing
else is public. This rewrites FILE in place and becomes the real binary, so that pid and arguments stay what
Serve expects. Standard library only, and nothing imported from this project: it must start in milliseconds.
"""

import json
import os
import re
import sys

UNAVAILABLE = {
    "error": {
        "message": "the service is starting or overloaded; try again shortly",
        "type": "server_error",
        "param": None,
        "code": "service_unavailable",
    }
}

# What every request goes through.
_REQUEST_RULES = (
    # A request id that the log lines and headers of everything behind the proxy can carry unharmed; others are dropped.
    "http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    # Serve would watch each client with two tasks and a queue, whatever the caller says here; the gateway does itself.
    "http-request set-header x-request-disconnect-disabled ?1",
    # Serve's own deadline, which would answer in Serve's words.
    "http-request del-header x-request-timeout-seconds",
)


def unavailable_response() -> bytes:
    """What the proxy itself answers for 502, 503 and 504, in the shape of the OpenAI API."""
    body = json.dumps(UNAVAILABLE).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "content-type: application/json\r\n"
        "retry-after: 1\r\n"
        "cache-control: no-cache\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def rewrite(config: str, error_file: str, host: str) -> str:
    """The configuration with the public door on `host`, loopback-only side doors, a private admin socket, JSON errors.

    Raises ValueError when a line that must be changed is not there: a newer Serve writes something else, and binding
    to all interfaces must not come back unnoticed.
    """
    address = f"[{host}]" if ":" in host else host
    requests = "".join(rf"\n\2{rule}" for rule in _REQUEST_RULES)
    rules = (
        (
            r"^(\s*bind) (?:\*|):(\d+)[ \t]*$(?=\n\s*(?:mode http\n\s*http-request use-service|stats enable))",
            r"\1 127.0.0.1:\2",
            2,
        ),
        (r"(stats socket \S+ mode) 666", r"\1 600", 1),
        (r"^(\s*)log \S+ local0 info$", r"\1log stderr format raw local0 notice", 1),
        (r"^(\s*errorfile 50[234]) .*$", rf"\1 {error_file}", 3),
        # With splicing, abortonclose misses about half of the clients that hang up before an answer begins.
        (r"^[ \t]*option splice-(?:request|response)[ \t]*\n", "", 2),
        (r"^(frontend http_frontend\n(\s+)bind) \S+:(\d+)$", rf"\1 {address}:\3{requests}", 1),
    )
    for pattern, replacement, expected in rules:
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if count != expected:
            raise ValueError(f"{pattern!r} matched {count} times instead of {expected}")
    return config


def main(argv: list[str]) -> None:
    host, binary, arguments = argv[1], argv[2], argv[3:]
    if "-f" in arguments:
        path = arguments[arguments.index("-f") + 1]
        error_file = os.path.join(os.path.dirname(path), "unavailable.http")
        with open(path) as file:
            config = rewrite(file.read(), error_file, host)
        with open(error_file, "wb") as file:
            file.write(unavailable_response())
        with open(path, "w") as file:
            file.write(config)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv)
