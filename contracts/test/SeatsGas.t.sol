// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Claim, Outcome, State} from "../src/disputes/DisputeTypes.sol";
import {DisputesWorld} from "./DisputesWorld.sol";

interface VmMeter {
    struct Gas {
        uint64 gasLimit;
        uint64 gasTotalUsed;
        uint64 gasMemoryUsed;
        int64 gasRefunded;
        uint64 gasRemaining;
    }

    function lastCallGas() external view returns (Gas memory);
    function cool(address target) external;
    function snapshotState() external returns (uint256);
    function revertToState(uint256 snapshot) external returns (bool);
}

/// What a market's moves cost among few and among many: nobody makes another's register, enrol, unenrol, challenge or draw dear by taking
/// seats, or by leaving them. Each move is measured alone, on storage that nothing has touched before it, and undone.
contract SeatsGasTest is DisputesWorld {
    VmMeter private constant meter = VmMeter(address(uint160(uint256(keccak256("hevm cheat code")))));
    uint256 private constant FIRST = 0x10000;
    /// Gas of a look that meets a hole: one cold slot and the hash that leads to it.
    uint256 private constant LOOK_MAX = 3_000;

    uint256 private nodes;

    struct Costs {
        uint256 register;
        uint256 enrol;
        uint256 unenrol;
        uint256 challenge;
        uint256 draw;
    }

    /// tests/unit/test_contracts_forge.py reads these.
    event log_named_uint(string name, uint256 value);

    function setUp() public {
        _build();
        _fund(token, vm.addr(CLIENT), address(registry), 1);
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            vm.prank(vm.addr(_verifier(i)));
            disputes.unenrol(MODEL);
        }
    }

    function test_gas_of_every_move_is_the_same_among_a_thousand_seats() public {
        _grow(5);
        Costs memory few = _costs();
        _grow(100);
        _compare(few, _costs());
        _grow(1_000);
        _compare(few, _costs());
    }

    /// As many holes as seats. Each count is five more than a multiple of the six holes that share a slot, so that the next one costs the same.
    function test_gas_of_every_move_is_the_same_among_hundreds_of_holes() public {
        uint256 start = meter.snapshotState();
        Costs memory few = _costsAmongHoles(10, 5);
        meter.revertToState(start);
        Costs memory more = _costsAmongHoles(100, 47);
        _compare(few, more);
        meter.revertToState(start);
        _compare(few, _costsAmongHoles(1_000, 497));
    }

    /// The dearest draw that there is: nearly every look meets a hole, and after the last one it ends without a panel.
    function test_gas_of_a_draw_that_finds_no_panel_is_bounded() public {
        _grow(400);
        _leave(395, 1);
        (bytes32 id, Claim memory c) = _claim(_provider(0), 10);
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
        blocks.roll(disputes.dispute(id).drawBlock + 1);
        uint256 gas = _gas(address(this), address(disputes), abi.encodeCall(disputes.draw, (id, _nonce(id))));
        _eq(uint256(disputes.dispute(id).outcome), uint256(Outcome.NoPanel), "outcome");
        emit log_named_uint("draw without a panel", gas);
        _true(gas <= 200_000 + disputes.DRAW_TRIES_MAX() * LOOK_MAX, "a look is dear");
    }

    // ------------------------------------------------------------------ private: the market

    function _grow(uint256 seats) private {
        while (nodes < seats) {
            uint256 key = FIRST + nodes++;
            _register(key);
            vm.prank(vm.addr(key));
            disputes.enrol(MODEL, bytes32(uint256(1)));
        }
        vm.warp(block.timestamp + 40);
    }

    function _register(uint256 key) private {
        address who = vm.addr(key);
        vm.prank(who);
        registry.register(7, "12D3KooW", bytes32(uint256(1)), "");
        vm.prank(vm.addr(CLIENT));
        registry.stake(who, 200);
    }

    /// While a draw is pending, that many leave, each `step` places from the one before.
    function _leave(uint256 count, uint256 step) private {
        _challenge(_provider(2), 10);
        for (uint256 i = 0; i < count; ++i) {
            vm.prank(vm.addr(FIRST + step * i));
            disputes.unenrol(MODEL);
        }
    }

    function _costsAmongHoles(uint256 seats, uint256 holes) private returns (Costs memory) {
        _grow(seats);
        _leave(holes, 2);
        return _costs();
    }

    // ------------------------------------------------------------------ private: the meter

    function _costs() private returns (Costs memory costs) {
        uint256 start = meter.snapshotState();
        address newcomer = vm.addr(FIRST + nodes);
        bytes memory register = abi.encodeCall(registry.register, (7, "12D3KooW", bytes32(uint256(1)), ""));
        costs.register = _gas(newcomer, address(registry), register);
        vm.prank(vm.addr(CLIENT));
        registry.stake(newcomer, 200);
        bytes memory enrol = abi.encodeCall(disputes.enrol, (MODEL, bytes32(uint256(1))));
        costs.enrol = _gas(newcomer, address(disputes), enrol);
        meter.revertToState(start);
        costs.unenrol = _gas(vm.addr(FIRST + 1), address(disputes), abi.encodeCall(disputes.unenrol, (MODEL)));
        meter.revertToState(start);
        (bytes32 id, Claim memory c, bytes32 nonce) = _prepared();
        costs.challenge = _gas(vm.addr(CLIENT), address(disputes), abi.encodeCall(disputes.challenge, (c)));
        blocks.roll(disputes.dispute(id).drawBlock + 1);
        costs.draw = _gas(address(this), address(disputes), abi.encodeCall(disputes.draw, (id, nonce)));
        _eq(uint256(disputes.dispute(id).state), uint256(State.Drawn), "no panel");
        meter.revertToState(start);
    }

    function _gas(address who, address target, bytes memory call) private returns (uint256 used) {
        meter.cool(address(disputes));
        meter.cool(address(registry));
        meter.cool(address(token));
        vm.prank(who);
        (bool ok,) = target.call(call);
        used = meter.lastCallGas().gasTotalUsed;
        _true(ok, "the move was refused");
    }

    /// A claim whose nonce draws five members with its first five looks: how many more looks a draw takes is luck, and each costs the same.
    function _prepared() private returns (bytes32 id, Claim memory c, bytes32 nonce) {
        (id, c) = _claim(_provider(0), 10);
        uint256 start = meter.snapshotState();
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
        uint256 drawBlock = disputes.dispute(id).drawBlock;
        blocks.roll(drawBlock + 1);
        bytes32 hash = blockhash(drawBlock);
        meter.revertToState(start);
        for (uint256 i = 0; i < 20_000 && !_seatsFiveAtOnce(keccak256(abi.encode(nonce, hash))); ++i) {
            nonce = bytes32(i);
        }
        c.nonceCommit = keccak256(abi.encode(id, vm.addr(CLIENT), nonce));
    }

    function _seatsFiveAtOnce(bytes32 seed) private view returns (bool) {
        address[5] memory found;
        uint256 size = disputes.verifierCount(MODEL);
        for (uint256 i = 0; i < 5; ++i) {
            found[i] = disputes.verifierAt(MODEL, uint256(keccak256(abi.encode(seed, i))) % size);
            if (found[i] == address(0)) return false;
            for (uint256 j = 0; j < i; ++j) {
                if (found[j] == found[i]) return false;
            }
        }
        return true;
    }

    function _compare(Costs memory few, Costs memory many) private {
        _same("register", few.register, many.register);
        _same("enrol", few.enrol, many.enrol);
        _same("unenrol", few.unenrol, many.unenrol);
        _same("challenge", few.challenge, many.challenge);
        _same("draw", few.draw, many.draw);
    }

    function _same(string memory move, uint256 few, uint256 many) private {
        emit log_named_uint(move, few);
        emit log_named_uint(move, many);
        _eq(few, many, move);
    }
}
