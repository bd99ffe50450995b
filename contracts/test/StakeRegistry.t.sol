// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Base} from "./Base.sol";

contract StakeRegistryTest is Base {
    address private constant DISPUTES = address(0xD15);
    address private constant OPERATOR = address(0x0E);
    uint40 private constant DELAY = 1 days;
    MarketToken private token;
    StakeRegistry private registry;

    function setUp() public {
        vm.chainId(31337);
        vm.warp(1_000_000);
        token = new MarketToken();
        registry = new StakeRegistry(IERC20(address(token)), DISPUTES, DELAY, address(0), 0, 0);
        _fund(token, OPERATOR, address(registry), 10);
        vm.prank(OPERATOR);
        registry.register(1, "12D3KooW", bytes32(uint256(1)), "127.0.0.1:1");
    }

    function _stake(uint96 amount) private {
        vm.prank(OPERATOR);
        registry.stake(OPERATOR, amount);
    }

    function testFuzz_slash_takes_what_was_locked_bonded_first_and_conserves(
        uint96 stake,
        uint96 unbond,
        uint96 lock,
        uint96 slash
    ) public {
        stake = uint96(_bound(stake, 1, 1e22));
        unbond = uint96(_bound(unbond, 0, stake));
        lock = uint96(_bound(lock, 1, stake));
        slash = uint96(_bound(slash, 1, lock));
        _stake(stake);
        if (unbond != 0) {
            vm.prank(OPERATOR);
            registry.beginUnbond(OPERATOR, unbond);
        }
        vm.startPrank(DISPUTES);
        registry.lock(OPERATOR, lock);
        registry.slash(OPERATOR, slash, address(0xBEEF));
        vm.stopPrank();
        StakeRegistry.Node memory node = registry.node(OPERATOR);
        uint96 bonded = stake - unbond;
        _eq(node.stake, slash > bonded ? 0 : bonded - slash, "bonded first");
        _eq(uint256(node.stake) + node.unbonding, stake - slash, "conserved");
        _eq(node.locked, lock - slash, "lock spent");
        _eq(token.balanceOf(address(0xBEEF)), slash, "paid");
    }

    function testFuzz_withdraw_never_touches_locked_stake(uint96 stake, uint96 unbond, uint96 lock) public {
        stake = uint96(_bound(stake, 1, 1e22));
        unbond = uint96(_bound(unbond, 1, stake));
        lock = uint96(_bound(lock, 1, stake));
        _stake(stake);
        vm.prank(OPERATOR);
        registry.beginUnbond(OPERATOR, unbond);
        vm.prank(DISPUTES);
        registry.lock(OPERATOR, lock);
        vm.warp(block.timestamp + DELAY);
        uint256 free = stake - lock;
        uint256 expected = unbond < free ? unbond : free;
        if (expected == 0) {
            vm.expectRevert(abi.encodeWithSelector(StakeRegistry.StakeLocked.selector, OPERATOR, lock));
        }
        vm.prank(OPERATOR);
        if (expected == 0) return registry.withdraw(OPERATOR);
        registry.withdraw(OPERATOR);
        _eq(token.balanceOf(address(registry)), stake - expected, "left");
    }

    function testFuzz_stakedSince_never_makes_fresh_stake_look_seasoned(uint96 first, uint96 second, uint32 wait)
        public
    {
        first = uint96(_bound(first, 1, 1e22));
        second = uint96(_bound(second, 1, 1e22));
        uint256 began = block.timestamp;
        _stake(first);
        vm.warp(began + wait);
        _stake(second);
        uint256 since = registry.node(OPERATOR).stakedSince;
        // amount-weighted: first * began + second * now <= since * total
        uint256 total = uint256(first) + second;
        _true(since * total >= uint256(first) * began + uint256(second) * (began + wait), "rounded for the claimant");
        _true(since <= began + wait, "later than now");
    }

    function testFuzz_nobody_slashes_where_disputes_is_zero(address caller) public {
        StakeRegistry other = new StakeRegistry(IERC20(address(token)), address(0), DELAY, address(0), 0, 0);
        vm.assume(caller != address(0));
        vm.expectRevert(abi.encodeWithSelector(StakeRegistry.NotDisputes.selector, caller));
        vm.prank(caller);
        other.slash(OPERATOR, 1, caller);
    }
}
