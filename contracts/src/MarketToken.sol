// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title MarketToken: play money of a local test network
/// @notice Anyone may mint from the faucet, so this token must never exist on a chain where it could be taken for value:
/// the constructor refuses every chain but the local one. Elsewhere the market is deployed with an existing ERC-20.
contract MarketToken is ERC20, ERC20Permit {
    /// @notice What one call of the faucet mints: 10,000 tokens of 18 decimals.
    uint256 public constant FAUCET_AMOUNT = 10_000e18;

    /// @notice The only chain id on which this token may be deployed.
    uint256 public constant TEST_CHAIN_ID = 31337;

    /// @notice The chain is not a local test network: use an existing ERC-20 there.
    /// @param chainId The chain that was tried.
    error TestNetworksOnly(uint256 chainId);

    constructor() ERC20("gpumarket test token", "GPUM") ERC20Permit("gpumarket test token") {
        if (block.chainid != TEST_CHAIN_ID) revert TestNetworksOnly(block.chainid);
    }

    /// @notice Mints `FAUCET_AMOUNT` to `to`; anyone may call it, as often as they like.
    function faucet(address to) external {
        _mint(to, FAUCET_AMOUNT);
    }
}
