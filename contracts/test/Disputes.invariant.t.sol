// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Claim, Dispute, Member, Outcome, State, Status} from "../src/disputes/DisputeTypes.sol";
import {Seat} from "../src/disputes/VerifierSeats.sol";
import {DisputesWorld} from "./DisputesWorld.sol";

/// Plays every role of disputes, legal moves and intrusions, in any order and at any time.
contract DisputesHandler is DisputesWorld {
    bytes32[] public ids; // of open disputes
    uint256[8] public outcomes; // how many ended each way
    mapping(bytes32 => mapping(address => uint64)) private committed;
    mapping(bytes32 => address[]) private pool; // the model's list when it was challenged
    bool public tookMoreThanLocked;
    bool public tookWithoutVerdict;
    bool public burnedLessThanHalf;
    bool public intruded;

    constructor() {
        _build();
    }

    function poolOf(bytes32 id) external view returns (address[] memory) {
        return pool[id];
    }

    function count() external view returns (uint256) {
        return ids.length;
    }

    /// Whoever can hold stake or credit.
    function accounts() external pure returns (address[] memory found) {
        found = new address[](PROVIDERS + VERIFIERS + 1);
        for (uint256 i = 0; i < PROVIDERS; ++i) {
            found[i] = vm.addr(_provider(i));
        }
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            found[PROVIDERS + i] = vm.addr(_verifier(i));
        }
        found[PROVIDERS + VERIFIERS] = vm.addr(CLIENT);
    }

    // ------------------------------------------------------------------ parties

    function challenge(uint256 pick, uint96 amount) external {
        uint256 key = pick % 4 == 0 ? _verifier(pick) : _provider(pick);
        if (ids.length >= 6 || registry.lockable(vm.addr(key)) < 101) return;
        if (disputes.seasonedCount(MODEL, uint64(block.timestamp)) < 5) return;
        bytes32 id = _challenge(key, uint96(_bound(amount, 0, 500)));
        ids.push(id);
        for (uint256 i = 0; i < disputes.verifierCount(MODEL); ++i) {
            pool[id].push(disputes.verifierAt(MODEL, i));
        }
        if (amount % 4 == 0) return;
        _draw(id);
        if (disputes.dispute(id).state == State.Finished) _close(id);
    }

    function draw(uint256 pick) external {
        (bool ok, bytes32 id, Dispute memory d) = _pick(pick, State.Challenged);
        if (ok && block.timestamp < d.drawUntil) _draw(id);
        if (ok && disputes.dispute(id).state == State.Finished) _close(id); // no panel was found
    }

    function reportMissing(uint256 pick, uint256 seat) external {
        (bool ok, bytes32 id, Dispute memory d) = _pick(pick, State.Drawn);
        Member memory member = d.members[seat % 5];
        if (!ok || block.timestamp >= d.reportUntil || member.status != Status.Drawn) return;
        vm.prank(member.operator);
        disputes.reportMissing(id);
    }

    function postEvidence(uint256 pick) external {
        (bool ok, bytes32 id, Dispute memory d) = _pick(pick, State.Drawn);
        if (!ok || d.missing == 0 || block.timestamp >= d.postUntil) return;
        vm.prank(d.challenger);
        disputes.postEvidence(id, "sealed");
    }

    /// Most members say the same, so that every quorum comes about.
    function commit(uint256 pick, uint256 seat, uint64 number) external {
        (bool ok, bytes32 id, Dispute memory d) = _pick(pick, State.Drawn);
        bool overdue = d.missing != 0 && !d.posted && block.timestamp >= d.postUntil;
        if (!ok || overdue || block.timestamp >= d.commitUntil) return;
        for (uint256 i = 0; i < 5; ++i) {
            Member memory member = d.members[(seat % 5 + i) % 5];
            if (member.status > Status.ReportedMissing || number >> i & 15 == 0) continue;
            bool guilty = uint256(id) % 2 == 0;
            if (number >> 8 + i & 7 == 0) guilty = !guilty;
            committed[id][member.operator] = guilty ? BOUND + 1 : BOUND;
            bytes32 commitment =
                disputes.commitmentOf(id, member.operator, committed[id][member.operator], "salt");
            vm.prank(member.operator);
            disputes.commit(id, commitment);
        }
    }

    function reveal(uint256 pick, uint256 seat) external {
        (bool ok, bytes32 id, Dispute memory d) = _pick(pick, State.Drawn);
        if (!ok || block.timestamp < d.commitUntil || block.timestamp >= d.revealUntil) return;
        for (uint256 i = 0; i < 5; ++i) {
            Member memory member = d.members[(seat % 5 + i) % 5];
            if (member.status != Status.Committed || seat >> 3 + i & 15 == 0) continue;
            vm.prank(member.operator);
            disputes.reveal(id, committed[id][member.operator], "salt");
        }
    }

    function finish(uint256 pick) external {
        if (ids.length == 0) return;
        bytes32 id = ids[pick % ids.length];
        Dispute memory d = disputes.dispute(id);
        StakeRegistry.Node memory node = registry.node(d.provider);
        (uint256 before, uint256 burned) = (uint256(node.stake) + node.unbonding, disputes.toBurn());
        try disputes.finish(id) {
            _close(id);
        } catch {
            return; // its time has not come
        }
        node = registry.node(d.provider);
        uint256 lost = before - node.stake - node.unbonding;
        Outcome outcome = disputes.dispute(id).outcome;
        if (lost > d.locked) tookMoreThanLocked = true;
        if (lost != 0 && outcome != Outcome.Slashed && outcome != Outcome.Restitution) tookWithoutVerdict = true;
        if ((disputes.toBurn() - burned) * 2 < lost) burnedLessThanHalf = true;
    }

    function pass(uint256 time) external {
        vm.warp(block.timestamp + time % 90);
        blocks.roll(block.number + time % 7);
    }

    // ------------------------------------------------------------------ seats and stake

    function enrol(uint256 i) external {
        address who = vm.addr(_verifier(i));
        if (disputes.joinedEpoch(MODEL, who) != 0) return;
        Seat memory seat = disputes.seat(who);
        if (seat.locked < 50 && registry.lockable(who) < 50 - seat.locked) return;
        _enrol(i);
    }

    function unenrol(uint256 i) external {
        address who = vm.addr(_verifier(i));
        if (i % 3 != 0 || disputes.joinedEpoch(MODEL, who) == 0) return;
        vm.prank(who);
        disputes.unenrol(MODEL);
    }

    /// One operator leaves and joins again and again, draws pending or not.
    function comeAndGo(uint256 i) external {
        address who = vm.addr(_verifier(i));
        Seat memory seat = disputes.seat(who);
        if (disputes.joinedEpoch(MODEL, who) == 0 || seat.panels != 0) return;
        if (registry.lockable(who) + seat.locked < 50) return;
        for (uint256 times = 0; times <= i % 3; ++times) {
            vm.prank(who);
            disputes.unenrol(MODEL);
            _enrol(i);
        }
    }

    function topUpSeat(uint256 i) external {
        address who = vm.addr(_verifier(i));
        Seat memory seat = disputes.seat(who);
        if (seat.models == 0 || seat.locked == 50 || registry.lockable(who) < 50 - seat.locked) return;
        vm.prank(who);
        disputes.topUpSeat();
    }

    function tidy(uint256 i) external {
        address who = vm.addr(_verifier(i));
        Seat memory seat = disputes.seat(who);
        if (seat.locked < 7 && disputes.joinedEpoch(MODEL, who) != 0) return disputes.evict(MODEL, who);
        if (seat.models == 0 && seat.panels == 0 && seat.locked != 0) return disputes.releaseSeat(who);
        if (disputes.verifierCount(MODEL) == 0) return;
        try disputes.compact(MODEL, i % disputes.verifierCount(MODEL)) {
            return;
        } catch {
            return; // no hole, or a draw is pending
        }
    }

    function unbond(uint256 i, uint96 amount) external {
        address who = vm.addr(i % 2 == 0 ? _provider(i) : _verifier(i));
        StakeRegistry.Node memory node = registry.node(who);
        if (node.stake == 0) return;
        vm.startPrank(who);
        registry.beginUnbond(who, uint96(_bound(amount, 1, node.stake)));
        vm.stopPrank();
    }

    function withdrawStake(uint256 i) external {
        address who = vm.addr(i % 2 == 0 ? _provider(i) : _verifier(i));
        StakeRegistry.Node memory node = registry.node(who);
        if (node.unbonding == 0 || block.timestamp < node.availableAt || registry.lockable(who) == 0) return;
        vm.prank(who);
        registry.withdraw(who);
    }

    function withdraw(uint256 i) external {
        address who = vm.addr(i % 2 == 0 ? CLIENT : _verifier(i));
        if (disputes.credited(who) == 0) return;
        vm.prank(who);
        disputes.withdraw(who);
    }

    function burn() external {
        if (disputes.toBurn() != 0) disputes.burn();
    }

    // ------------------------------------------------------------------ intrusions

    /// A stranger makes the moves of others, and signs what others should have signed.
    function intrude(uint256 pick, uint256 key, uint256 kind) external {
        key = _bound(key, 0x10000, type(uint64).max);
        bytes memory call;
        if (kind % 4 == 0) {
            (bytes32 id, Claim memory c) = _claim(_provider(pick), 10);
            c.delegation = _signed(key, keccak256(abi.encode(id)));
            call = abi.encodeCall(disputes.challenge, (c));
        } else {
            if (ids.length == 0) return;
            bytes32 id = ids[pick % ids.length];
            if (kind % 4 == 1) call = abi.encodeCall(disputes.commit, (id, bytes32(key)));
            if (kind % 4 == 2) call = abi.encodeCall(disputes.reveal, (id, uint64(key), "salt"));
            if (kind % 4 == 3) call = abi.encodeCall(disputes.draw, (id, bytes32(key)));
        }
        vm.prank(vm.addr(key));
        (bool ok,) = address(disputes).call(call);
        if (ok) intruded = true;
    }

    function _close(bytes32 id) private {
        ++outcomes[uint256(disputes.dispute(id).outcome)];
        for (uint256 i = 0; i < ids.length; ++i) {
            if (ids[i] != id) continue;
            ids[i] = ids[ids.length - 1];
            return ids.pop();
        }
    }

    function _pick(uint256 pick, State state) private view returns (bool ok, bytes32 id, Dispute memory d) {
        for (uint256 i = 0; i < ids.length; ++i) {
            id = ids[(pick % ids.length + i) % ids.length];
            d = disputes.dispute(id);
            if (d.state == state) return (true, id, d);
        }
    }
}

contract DisputesInvariants is DisputesWorld {
    DisputesHandler private handler;

    function setUp() public {
        handler = new DisputesHandler();
        (token, registry, disputes) = (handler.token(), handler.registry(), handler.disputes());
        _target(address(handler));
    }

    /// One campaign for all that must hold after each move.
    /// forge-config: default.invariant.runs = 12
    /// forge-config: thorough.invariant.runs = 64
    function invariant_solvency_locks_slashes_and_no_forgery() public view {
        _solvency();
        _every_lock_has_its_reason();
        _exactly_the_locked_is_slashed();
        _draws_keep_their_places();
        _true(!handler.intruded(), "a stranger's move was taken");
    }

    /// I1: what the contract holds is what it owes: credits, bonds of open disputes, and what waits to be burned.
    function _solvency() private view {
        _eq(token.balanceOf(address(disputes)), _credits() + _openBonds() + disputes.toBurn(), "solvency");
    }

    /// The registry holds locked exactly what seats and open disputes hold, node by node: nothing is locked for no reason.
    function _every_lock_has_its_reason() private view {
        address[] memory all = handler.accounts();
        for (uint256 i = 0; i < all.length; ++i) {
            uint256 reasons = disputes.seat(all[i]).locked;
            for (uint256 j = 0; j < handler.count(); ++j) {
                Dispute memory d = disputes.dispute(handler.ids(j));
                if (d.provider == all[i]) reasons += d.locked;
            }
            _eq(registry.node(all[i]).locked, reasons, "locked");
        }
    }

    /// Where a draw is pending nobody sits where somebody else could be drawn, and all who stayed sit where they sat. The list is no longer
    /// than it was when all were on it, whoever left and joined in between.
    function _draws_keep_their_places() private view {
        _true(disputes.verifierCount(MODEL) <= VERIFIERS, "the list grew");
        for (uint256 j = 0; j < handler.count(); ++j) {
            Dispute memory d = disputes.dispute(handler.ids(j));
            if (d.state != State.Challenged) continue;
            address[] memory before = handler.poolOf(handler.ids(j));
            _eq(before.length, d.poolSize, "pool");
            for (uint256 i = 0; i < before.length; ++i) {
                address now_ = disputes.verifierAt(MODEL, i);
                if (now_ == before[i]) continue;
                _true(!_drawable(now_, d), "somebody else could be drawn");
                _true(!_drawable(before[i], d), "a seat changed its place");
            }
        }
    }

    function _drawable(address operator, Dispute memory d) private view returns (bool) {
        uint256 joined = disputes.joinedEpoch(MODEL, operator);
        return joined != 0 && joined + _terms().seasoningEpochs < d.issuedAt / _terms().epochSeconds;
    }

    /// A verdict takes at most its own lock, only on its quorum, and half of it burns.
    function _exactly_the_locked_is_slashed() private view {
        _true(!handler.tookMoreThanLocked(), "more than the lock");
        _true(!handler.tookWithoutVerdict(), "without a verdict");
        _true(!handler.burnedLessThanHalf(), "less than half burned");
    }

    /// The handler is no idle one: in a few thousand moves disputes end in every way there is.
    function test_handler_reaches_every_outcome() public {
        uint256 seed = 1;
        for (uint256 i = 0; i < 3_000; ++i) {
            seed = uint256(keccak256(abi.encode(seed)));
            _move(seed % 16, seed >> 8, seed >> 90);
        }
        for (uint256 outcome = 1; outcome < 8; ++outcome) {
            _true(handler.outcomes(outcome) != 0 || outcome == uint256(Outcome.NoPanel), "an outcome was not reached");
        }
        invariant_solvency_locks_slashes_and_no_forgery();
    }

    function _move(uint256 which, uint256 a, uint256 b) private {
        if (which < 2) handler.challenge(a, uint96(b));
        else if (which == 2) handler.draw(a);
        else if (which == 3) handler.reportMissing(a, b);
        else if (which == 4) handler.postEvidence(a);
        else if (which < 7) handler.commit(a, b, uint64(b >> 8));
        else if (which < 9) handler.reveal(a, b);
        else if (which == 9) handler.finish(a);
        else if (which == 10) handler.pass(a);
        else if (which == 11) handler.topUpSeat(a);
        else if (which == 12) handler.enrol(a);
        else if (which == 13) a % 8 == 0 ? handler.unenrol(b) : a % 8 == 1 ? handler.comeAndGo(b) : handler.tidy(b);
        else if (which == 14) handler.withdraw(a);
        else _refill(a);
    }

    /// Providers and verifiers that were slashed stake again, so that long runs do not run dry.
    function _refill(uint256 a) private {
        address who = handler.accounts()[a % (PROVIDERS + VERIFIERS)];
        if (registry.node(who).stake > 1_000) return;
        token.faucet(who);
        vm.prank(who);
        registry.stake(who, 2_000);
    }

    /// From any state time alone ends every dispute, frees every seat and provider, and lets all credit out.
    /// forge-config: default.invariant.runs = 12
    /// forge-config: thorough.invariant.runs = 64
    function invariant_liveness_of_exit() public {
        uint256 start = block.timestamp;
        vm.warp(start + 60 + 420);
        for (uint256 i = 0; i < handler.count(); ++i) {
            disputes.finish(handler.ids(i));
        }
        address[] memory all = handler.accounts();
        for (uint256 i = 0; i < all.length; ++i) {
            vm.startPrank(all[i]);
            if (disputes.joinedEpoch(MODEL, all[i]) != 0) disputes.unenrol(MODEL);
            else if (disputes.seat(all[i]).locked != 0) disputes.releaseSeat(all[i]);
            if (disputes.credited(all[i]) != 0) disputes.withdraw(all[i]);
            vm.stopPrank();
            _eq(registry.node(all[i]).locked, 0, "locked for ever");
        }
        if (disputes.toBurn() != 0) disputes.burn();
        _eq(token.balanceOf(address(disputes)), 0, "left behind");
        vm.warp(start);
    }

    function _credits() private view returns (uint256 sum) {
        address[] memory all = handler.accounts();
        for (uint256 i = 0; i < all.length; ++i) {
            sum += disputes.credited(all[i]);
        }
    }

    function _openBonds() private view returns (uint256 sum) {
        for (uint256 i = 0; i < handler.count(); ++i) {
            sum += disputes.dispute(handler.ids(i)).bond;
        }
    }
}
