// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Base} from "./Base.sol";

/// Moves of operators, their owners, Disputes, the guardian and strangers, with books of its own beside the contract's.
contract RegistryHandler is Base {
    address public constant DISPUTES = address(0xD15);
    address private constant GUARDIAN = address(0x6A);
    address private constant COLD = address(0xC01D);
    uint40 public constant DELAY = 1 days;
    uint96 private constant STAKE_MAX = 5e19;
    uint256 private constant TOTAL_MAX = 1e20;
    address[3] public operators = [address(0xE1), address(0xE2), address(0xE3)];
    MarketToken public token;
    StakeRegistry public registry;
    uint256 public slashed;
    bool public letInWrongly;
    bool public keptOutWrongly;
    bool public intruded;
    bool public leftEarly;

    constructor() {
        vm.chainId(31337);
        vm.warp(1_000_000);
        token = new MarketToken();
        registry = new StakeRegistry(IERC20(address(token)), DISPUTES, DELAY, GUARDIAN, STAKE_MAX, TOTAL_MAX);
        vm.prank(COLD);
        registry.approveOperator(operators[2], true);
        for (uint256 i = 0; i < 3; ++i) {
            _fund(token, operators[i], address(registry), 100);
            vm.prank(operators[i]);
            registry.registerWithOwner(i == 2 ? COLD : operators[i], 7, "12D3KooW", bytes32(uint256(1)), "");
        }
    }

    function stake(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        amount = uint96(_bound(amount, 1, STAKE_MAX));
        StakeRegistry.Node memory node = registry.node(operator);
        bool allowed = !registry.entryPaused() && uint256(node.stake) + node.unbonding + amount <= STAKE_MAX
            && token.balanceOf(address(registry)) + amount <= TOTAL_MAX;
        vm.prank(operator);
        try registry.stake(operator, amount) {
            if (!allowed) letInWrongly = true;
        } catch {
            if (allowed) keptOutWrongly = true;
        }
    }

    function beginUnbond(uint256 pick, uint96 amount) external {
        address operator = operators[pick % 3];
        uint96 bonded = registry.node(operator).stake;
        if (bonded == 0) return;
        vm.prank(registry.node(operator).owner);
        registry.beginUnbond(operator, uint96(_bound(amount, 1, bonded)));
    }

    /// Sometimes too early, which must fail.
    function withdraw(uint256 pick, bool wait) external {
        address operator = operators[pick % 3];
        StakeRegistry.Node memory node = registry.node(operator);
        if (node.unbonding == 0 || registry.lockable(operator) == 0) return;
        if (block.timestamp < node.availableAt) {
            vm.prank(node.owner);
            try registry.withdraw(operator) {
                leftEarly = true;
            } catch {
                if (wait) vm.warp(node.availableAt);
            }
        }
        if (block.timestamp < node.availableAt) return;
        vm.prank(node.owner);
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

    function pause(bool paused) external {
        vm.prank(GUARDIAN);
        registry.pauseEntry(paused);
    }

    function leaveAndReturn(uint256 pick) external {
        vm.startPrank(operators[pick % 3]);
        registry.deregister();
        registry.register(7, "12D3KooW", bytes32(uint256(1)), "");
        vm.stopPrank();
    }

    /// A stranger, or the hot key of a node that a cold one owns, tries every move that belongs to somebody else.
    function intrude(uint256 pick, uint160 who) external {
        address operator = operators[pick % 3];
        address stranger = address(uint160(_bound(who, 0x1000_0000, type(uint128).max)));
        if (pick % 3 == 2 && who % 2 == 0) stranger = operator;
        bytes[6] memory moves = [
            abi.encodeCall(registry.beginUnbond, (operator, 1)),
            abi.encodeCall(registry.withdraw, (operator)),
            abi.encodeCall(registry.lock, (operator, 1)),
            abi.encodeCall(registry.unlock, (operator, 1)),
            abi.encodeCall(registry.slash, (operator, 1, stranger)),
            abi.encodeCall(registry.pauseEntry, (true))
        ];
        for (uint256 i = 0; i < moves.length; ++i) {
            vm.prank(stranger);
            (bool done,) = address(registry).call(moves[i]);
            if (done) intruded = true;
        }
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

    function invariant_nobody_else_moves_a_nodes_stake() public view {
        _true(!handler.intruded(), "a stranger's move went through");
        _true(!handler.leftEarly(), "withdrawn before the delay");
    }

    function invariant_entry_is_refused_exactly_above_the_limits_and_while_paused() public view {
        _true(!handler.letInWrongly(), "let in above a limit or while paused");
        _true(!handler.keptOutWrongly(), "kept out within the limits");
    }

    /// From every state that was reached, paused or not: each owner takes out, after one delay, all that no dispute holds, and with the
    /// locks released everything.
    function invariant_liveness_of_exit() public {
        StakeRegistry registry = handler.registry();
        uint256 held;
        for (uint256 i = 0; i < 3; ++i) {
            address operator = handler.operators(i);
            StakeRegistry.Node memory node = registry.node(operator);
            held += node.locked;
            if (node.stake == 0) continue;
            vm.prank(node.owner);
            registry.beginUnbond(operator, node.stake);
        }
        vm.warp(block.timestamp + handler.DELAY());
        _withdrawAll(registry);
        _eq(handler.token().balanceOf(address(registry)), held, "only what disputes hold stays");
        for (uint256 i = 0; i < 3; ++i) {
            address operator = handler.operators(i);
            uint96 locked = registry.node(operator).locked;
            if (locked == 0) continue;
            vm.prank(handler.DISPUTES());
            registry.unlock(operator, locked);
        }
        _withdrawAll(registry);
        _eq(handler.token().balanceOf(address(registry)), 0, "left behind");
    }

    function _withdrawAll(StakeRegistry registry) private {
        for (uint256 i = 0; i < 3; ++i) {
            address operator = handler.operators(i);
            StakeRegistry.Node memory node = registry.node(operator);
            if (node.unbonding == 0 || registry.lockable(operator) == 0) continue;
            vm.prank(node.owner);
            registry.withdraw(operator);
        }
    }
}
