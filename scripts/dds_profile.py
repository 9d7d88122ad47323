"""Fast DDS profile for a graph on several machines: config/fastdds.xml with one network interface more and the other machines as peers.

`python scripts/dds_profile.py --address 192.168.1.10 --peers 192.168.1.11 192.168.1.12 --out runs/fastdds.xml`. Sockets are on the loopback
and on --address, nowhere else; nodes are looked for at the peers, without multicast. Whoever reaches that network reaches the graph: turn
SROS 2 on (docs/safety.md). Standard library only.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path
from xml.etree import ElementTree

PROFILE = Path(__file__).parents[1] / "config" / "fastdds.xml"
NAMESPACE = "http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles"
LOOPBACK = "127.0.0.1"


def check_address(text: str) -> str:
    """An IPv4 address of one interface. Raises ValueError."""
    address = ipaddress.IPv4Address(text)
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"expected the address of one machine, found {text}.")
    return str(address)


def make_profile(address: str, peers: list[str]) -> str:
    """The profile as XML. address: of this machine in the common network; peers: of the other machines. Raises ValueError."""
    own, others = check_address(address), [check_address(peer) for peer in peers]
    root = ElementTree.parse(PROFILE).getroot()
    tag = f"{{{NAMESPACE}}}"
    for list_name, addresses in (
        ("interfaceWhiteList", [own]),
        ("metatrafficUnicastLocatorList", [own]),
        ("initialPeersList", [own, *others]),
    ):
        (parent,) = root.iter(tag + list_name)
        for new in dict.fromkeys(addresses):
            if new != LOOPBACK:
                parent.append(_entry(parent[0], new))
    ElementTree.register_namespace("", NAMESPACE)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _entry(example: ElementTree.Element, address: str) -> ElementTree.Element:
    """Like the example, which names the loopback, with another address."""
    entry = ElementTree.fromstring(ElementTree.tostring(example))
    for element in entry.iter():
        if element.tag.endswith("}address"):
            element.text = address
    return entry


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True, help="of this machine in the network that the machines share")
    parser.add_argument("--peers", nargs="+", default=[], help="of the other machines")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        profile = make_profile(arguments.address, arguments.peers)
    except ValueError as error:
        print(f"dds_profile: {error} Mend: give IPv4 addresses, as 192.168.1.10.", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
