// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Hashes of past blocks: the last 256 by BLOCKHASH, the last 8191 from the history contract where the chain has it (EIP-2935)
library BlockHashes {
    /// @notice Same address on every chain that has it.
    address internal constant HISTORY = 0x0000F90827F1C53a10cb7A02335B175320002935;

    /// @notice The hash of a block, zero when neither source knows it (any more).
    function get(uint256 number) internal view returns (bytes32 found) {
        found = blockhash(number);
        if (found != 0) return found;
        (bool ok, bytes memory answer) = HISTORY.staticcall(abi.encode(number));
        if (ok && answer.length == 32) found = abi.decode(answer, (bytes32));
    }
}
