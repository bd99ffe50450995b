"""Health check of a container: is what runs here able to work? `healthy PORT` asks /readyz, `healthy chain` asks for a block number.

Only the standard library, and of that little: it runs every few seconds.
"""

import http.client
import sys

what = sys.argv[1]
if what == "chain":
    connection = http.client.HTTPConnection("127.0.0.1", 8545, timeout=4)
    body = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
    connection.request("POST", "/", body, {"Content-Type": "application/json"})
else:
    connection = http.client.HTTPConnection("127.0.0.1", int(what), timeout=18)
    connection.request("GET", "/readyz")
answer = connection.getresponse()
said = answer.read(4096).decode(errors="replace")
print(said)
healthy = answer.status == 200 and ("result" in said if what == "chain" else True)
sys.exit(0 if healthy else 1)
