// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Base} from "./Base.sol";
import {FeeToken} from "./HostileTokens.sol";

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
        registry = new StakeRegistry(IERC20(address(token)), DISPUTES, DELAY);
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

    function test_fee_on_transfer_token_is_refused() public {
        FeeToken fee = new FeeToken();
        StakeRegistry other = new StakeRegistry(IERC20(address(fee)), DISPUTES, DELAY);
        fee.approve(address(other), type(uint256).max);
        other.register(1, "12D3KooW", bytes32(uint256(1)), "");
        vm.expectRevert(abi.encodeWithSelector(StakeRegistry.UnexpectedDeposit.selector, 1000, 990));
        other.stake(address(this), 1000);
    }

    function testFuzz_nobody_slashes_where_disputes_is_zero(address caller) public {
        StakeRegistry other = new StakeRegistry(IERC20(address(token)), address(0), DELAY);
        vm.assume(caller != address(0));
        vm.expectRevert(abi.encodeWithSelector(StakeRegistry.NotDisputes.selector, caller));
        vm.prank(caller);
        other.slash(OPERATOR, 1, caller);
    }
}

/// Moves of an operator, its owner and Disputes, always legal, so that every run goes deep.
contract RegistryHandler is Base {
    address public constant DISPUTES = address(0xD15);
    address[3] public operators = [address(0xE1), address(0xE2), address(0xE3)];
    MarketToken public token;
    StakeRegistry public registry;
    uint256 public slashed;

    constructor() {
        vm.chainId(31337);
        vm.warp(1_000_000);
        token = new MarketToken();
        registry = new StakeRegistry(IERC20(address(token)), DISPUTES, 1 days);
        for (uint256 i = 0; i < 3; ++i) {
            _fund(token, operators[i], address(registry), 100);
            vm.prank(operators[i]);
            registry.register(7, "12D3KooW", bytes32(uint256(1)), "");
        }
    }

    function stake(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        amount = uint96(_bound(amount, 1, 1e20));
        vm.prank(operator);
        registry.stake(operator, amount);
    }

    function beginUnbond(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        uint96 bonded = registry.node(operator).stake;
        if (bonded == 0) return;
        vm.prank(operator);
        registry.beginUnbond(operator, uint96(_bound(amount, 1, bonded)));
    }

    function withdraw(uint256 pick) external {
        address operator = operators[pick % 3];
        StakeRegistry.Node memory node = registry.node(operator);
        if (node.unbonding == 0 || registry.lockable(operator) == 0) return;
        if (block.timestamp < node.availableAt) vm.warp(node.availableAt);
        vm.prank(operator);
        registry.withdraw(operator);
    }

    function lock(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        uint256 free = registry.lockable(operator);
        if (free == 0) return;
        vm.prank(DISPUTES);
        registry.lock(operator, uint96(_bound(amount, 1, free)));
    }

    function unlock(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        uint96 locked = registry.node(operator).locked;
        if (locked == 0) return;
        vm.prank(DISPUTES);
        registry.unlock(operator, uint96(_bound(amount, 1, locked)));
    }

    function slash(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        uint96 locked = registry.node(operator).locked;
        if (locked == 0) return;
        amount = uint96(_bound(amount, 1, locked));
        vm.prank(DISPUTES);
        registry.slash(operator, amount, DISPUTES);
        slashed += amount;
    }
}

contract StakeRegistryInvariants is Base {
    RegistryHandler private handler;

    function setUp() public {
        handler = new RegistryHandler();
        _target(address(handler));
    }

    function invariant_solvency() public view {
        uint256 owed;
        for (uint256 i = 0; i < 3; ++i) {
            StakeRegistry.Node memory node = handler.registry().node(handler.operators(i));
            owed += uint256(node.stake) + node.unbonding;
        }
        _eq(handler.token().balanceOf(address(handler.registry())), owed, "solvency");
        _eq(handler.token().balanceOf(handler.DISPUTES()), handler.slashed(), "slashed");
    }

    function invariant_locked_never_exceeds_what_is_there() public view {
        for (uint256 i = 0; i < 3; ++i) {
            StakeRegistry.Node memory node = handler.registry().node(handler.operators(i));
            _true(node.locked <= uint256(node.stake) + node.unbonding, "locked more than there is");
            _true((node.unbonding == 0) == (node.availableAt == 0), "availableAt");
            _true((node.stake == 0) == (node.stakedSince == 0), "stakedSince");
        }
    }
}
