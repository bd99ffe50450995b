// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {MarketToken} from "../src/MarketToken.sol";

/// The dozen cheatcodes that our tests use.
interface Vm {
    function addr(uint256 key) external pure returns (address);
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function prank(address sender) external;
    function startPrank(address sender) external;
    function stopPrank() external;
    function warp(uint256 timestamp) external;
    function chainId(uint256 id) external;
    function expectRevert(bytes calldata data) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data) external;
    function assume(bool condition) external pure;
}

/// Assertions and a funded token; no third-party test library.
abstract contract Base {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));
    bool public constant IS_TEST = true;

    address[] private _targets;

    error NotEqual(string what, uint256 left, uint256 right);
    error NotTrue(string what);

    /// Contracts that the invariant runner calls.
    function targetContracts() public view returns (address[] memory) {
        return _targets;
    }

    function _target(address contract_) internal {
        _targets.push(contract_);
    }

    function _eq(uint256 left, uint256 right, string memory what) internal pure {
        if (left != right) revert NotEqual(what, left, right);
    }

    function _eq(address left, address right, string memory what) internal pure {
        if (left != right) revert NotEqual(what, uint160(left), uint160(right));
    }

    function _true(bool value, string memory what) internal pure {
        if (!value) revert NotTrue(what);
    }

    function _bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + value % (high - low + 1);
    }

    function _signature(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    /// EIP-2098.
    function _compact(uint256 key, bytes32 digest) internal pure returns (bytes32 r, bytes32 vs) {
        uint8 v;
        bytes32 s;
        (v, r, s) = vm.sign(key, digest);
        vs = bytes32(uint256(s) | (uint256(v - 27) << 255));
    }

    /// A rich account with its allowance given.
    function _fund(MarketToken token, address who, address spender, uint256 faucets) internal {
        for (uint256 i = 0; i < faucets; ++i) {
            token.faucet(who);
        }
        vm.prank(who);
        token.approve(spender, type(uint256).max);
    }
}
