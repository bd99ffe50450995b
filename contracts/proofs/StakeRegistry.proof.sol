// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Base} from "../test/Base.sol";
import {PlainToken} from "./PaymentChannels.proof.sol";

interface Storage {
    function store(address target, bytes32 slot, bytes32 value) external;
}

/// Proofs of stake and slash for every amount and caller at once; they stand on the same grounds as PaymentChannelsProof.
contract StakeRegistryProof is Base {
    uint40 private constant DELAY = 1 days;
    address private constant DISPUTES = address(0xD15);
    address private constant OPERATOR = address(0x1001);
    address private constant OWNER = address(0x2002);
    address private constant VICTIM = address(0x3003);
    uint40 private constant STAKED_SINCE = 900_000;
    uint40 private constant AVAILABLE_AT = 1_050_000;
    uint256 private constant NODES_SLOT = 2; // tests/unit/test_contracts_proofs.py compares it with the compiler's layout
    Storage private constant store = Storage(address(uint160(uint256(keccak256("hevm cheat code")))));
    PlainToken private token;
    StakeRegistry private registry;

    function setUp() public {
        vm.warp(1_000_000);
        token = new PlainToken();
        registry = new StakeRegistry(token, DISPUTES, DELAY, address(0), 0, 0);
    }

    /// Any state that the registry's own invariant allows, written straight to storage: `locked` is at most what there is.
    function _node(uint96 stake, uint96 unbonding, uint96 locked) private {
        vm.assume(uint256(stake) + unbonding <= type(uint96).max && locked <= uint256(stake) + unbonding);
        bytes32 slot = keccak256(abi.encode(OPERATOR, NODES_SLOT));
        store.store(address(registry), bytes32(uint256(slot) + 1), bytes32(uint256(stake) | (uint256(unbonding) << 96)));
        store.store(address(registry), bytes32(uint256(slot) + 2), bytes32(uint256(locked)));
        uint256 first = uint160(OWNER) | (uint256(1) << 160) | (uint256(STAKED_SINCE) << 168);
        store.store(address(registry), slot, bytes32(first | (uint256(AVAILABLE_AT) << 208)));
        token.transfer(address(registry), uint256(stake) + unbonding);
    }

    /// Whoever calls, with whatever amount and state: a slash goes through only for Disputes, takes no more than was locked, bonded stake
    /// first, pays exactly that, and leaves the rest where it was.
    function check_slash_takes_only_what_was_locked_and_only_for_disputes(
        uint96 stake,
        uint96 unbonding,
        uint96 locked,
        uint96 amount,
        address caller
    ) public {
        _node(stake, unbonding, locked);
        vm.prank(caller);
        (bool done,) = address(registry).call(abi.encodeCall(registry.slash, (OPERATOR, amount, VICTIM)));
        StakeRegistry.Node memory node = registry.node(OPERATOR);
        uint256 taken = done ? amount : 0;
        if (done) assert(caller == DISPUTES && amount != 0 && amount <= locked);
        else assert(caller != DISPUTES || amount == 0 || amount > locked);
        assert(token.balanceOf(VICTIM) == taken);
        assert(node.locked == locked - taken);
        assert(uint256(node.stake) + node.unbonding == uint256(stake) + unbonding - taken);
        assert(node.unbonding == unbonding || node.stake == 0); // bonded first
        assert(token.balanceOf(address(registry)) == uint256(stake) + unbonding - taken);
    }

    /// A withdrawal goes through only for the owner and after the delay, pays only the owner, and never what is locked.
    function check_withdraw_never_takes_locked_stake(
        uint96 stake,
        uint96 unbonding,
        uint96 locked,
        uint40 time,
        address caller
    ) public {
        _node(stake, unbonding, locked);
        vm.warp(time);
        vm.prank(caller);
        (bool done,) = address(registry).call(abi.encodeCall(registry.withdraw, (OPERATOR)));
        StakeRegistry.Node memory node = registry.node(OPERATOR);
        uint256 free = uint256(stake) + unbonding - locked;
        if (done) assert(caller == OWNER && time >= AVAILABLE_AT && unbonding != 0 && free != 0);
        else assert(caller != OWNER || time < AVAILABLE_AT || unbonding == 0 || free == 0);
        uint256 paid = token.balanceOf(OWNER);
        assert(paid == (done ? (unbonding < free ? unbonding : free) : 0));
        assert(node.stake == stake && node.unbonding == unbonding - paid);
        assert(node.locked == locked && uint256(node.stake) + node.unbonding >= locked);
    }

    /// A lock moves nothing but the lock, never goes above what is there, and is for Disputes alone.
    function check_lock_never_exceeds_what_is_there(
        uint96 stake,
        uint96 unbonding,
        uint96 locked,
        uint96 more,
        address caller
    ) public {
        _node(stake, unbonding, locked);
        vm.prank(caller);
        (bool done,) = address(registry).call(abi.encodeCall(registry.lock, (OPERATOR, more)));
        StakeRegistry.Node memory node = registry.node(OPERATOR);
        uint256 held = uint256(stake) + unbonding;
        if (done) assert(caller == DISPUTES && more != 0 && uint256(locked) + more <= held);
        else assert(caller != DISPUTES || more == 0 || uint256(locked) + more > held);
        assert(node.locked == uint256(locked) + (done ? more : 0));
        assert(node.stake == stake && node.unbonding == unbonding);
    }
}
