// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Disputes} from "../src/Disputes.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {DisputeBook} from "../src/disputes/DisputeBook.sol";
import {DisputeTerms, Terms} from "../src/disputes/DisputeTerms.sol";
import {Claim, Dispute, Outcome} from "../src/disputes/DisputeTypes.sol";
import {IStakeRegistry} from "../src/disputes/IStakeRegistry.sol";
import {Payouts, Split} from "../src/disputes/Payouts.sol";
import {DisputesWorld} from "./DisputesWorld.sol";

contract DisputesTest is DisputesWorld {
    function setUp() public {
        _build();
    }

    // ------------------------------------------------------------------ the arithmetic of a verdict

    /// What is taken is what was locked; its parts add up; half of it burns.
    function testFuzz_slash_conserves_and_burns_half(
        uint96 locked,
        uint96 amount,
        uint256 winners,
        uint32 burnPpm,
        uint32 challengerPpm,
        uint96 fee,
        uint32 multiple
    ) public pure {
        Terms memory t = _anyTerms(burnPpm, challengerPpm, fee, multiple);
        winners = _bound(winners, 3, 5);
        Split memory s = Payouts.slash(t, locked, amount, winners);
        _eq(s.taken, locked, "takes the lock");
        _check(t, s, winners);
        _true(s.victim <= uint256(amount) * t.victimMultiple, "victim");
    }

    /// A restitution never takes more than the lock, never pays the victim more than its amount, and burns as much as it pays.
    function testFuzz_restore_conserves_is_bounded_and_burns_half(
        uint96 locked,
        uint96 amount,
        uint256 winners,
        uint32 burnPpm,
        uint96 fee
    ) public pure {
        Terms memory t = _anyTerms(burnPpm, 0, fee, 1);
        winners = _bound(winners, 3, 5);
        Split memory s = Payouts.restore(t, locked, amount, winners);
        _true(s.taken <= locked, "within the lock");
        _eq(s.challenger, 0, "no bounty");
        _check(t, s, winners);
        _true(s.victim <= amount, "victim");
        uint256 need = amount + winners * t.panelFee;
        if (s.taken - s.burned >= 5 * uint256(t.panelFee)) _true(s.each >= t.panelFee, "fees come first");
        if (s.taken < locked) {
            _eq(s.victim, amount, "made whole");
            _true(s.each >= t.panelFee, "panel paid");
            _true(s.taken <= need * 1_000_000 / (1_000_000 - t.burnPpm) + 1, "no more than it needs");
        }
    }

    function _check(Terms memory t, Split memory s, uint256 winners) private pure {
        _eq(s.burned + s.victim + s.challenger + s.each * winners, s.taken, "conserved");
        _true(s.burned * 1_000_000 >= s.taken * t.burnPpm, "burned");
        _true((s.taken - s.burned) * 2 <= s.taken, "nobody gains by being slashed");
    }

    function _anyTerms(uint32 burnPpm, uint32 challengerPpm, uint96 fee, uint32 multiple)
        private
        pure
        returns (Terms memory t)
    {
        t.burnPpm = uint32(_bound(burnPpm, 500_000, 900_000));
        t.challengerPpm = uint32(_bound(challengerPpm, 0, 1_000_000));
        t.panelFee = uint96(_bound(fee, 1, 1e24));
        t.victimMultiple = uint32(_bound(multiple, 1, 1_000));
    }

    // ------------------------------------------------------------------ whole disputes

    /// However the five vote, the outcome is the published one and the provider loses no more than its lock.
    /// forge-config: default.fuzz.runs = 100
    function testFuzz_finish_decides_by_quorum(uint96 amount, uint256 beyond) public {
        amount = uint96(_bound(amount, 0, 400));
        beyond = _bound(beyond, 0, 5);
        uint256 provider = _provider(0);
        bytes32 id = _challenge(provider, amount);
        _draw(id);
        _decide(id, beyond);
        Dispute memory d = disputes.dispute(id);
        Outcome expected = beyond >= 4 ? Outcome.Slashed : beyond == 3 ? Outcome.Restitution : Outcome.Dismissed;
        _eq(uint256(d.outcome), uint256(expected), "outcome");
        StakeRegistry.Node memory node = registry.node(vm.addr(provider));
        _eq(node.locked, 0, "unlocked");
        uint256 lost = 5_000 - node.stake;
        if (beyond >= 4) _eq(lost, d.locked, "exactly the locked");
        if (beyond < 3) _eq(lost, 0, "honest work costs nothing");
        _true(lost <= d.locked, "at most the locked");
        _true(disputes.toBurn() * 2 >= lost, "half burns");
    }

    /// A provider that owns client, challenger and all of the panel still loses half of what it lets be taken.
    /// forge-config: default.fuzz.runs = 100
    function testFuzz_slashing_oneself_loses_half(uint96 amount, uint256 beyond) public {
        amount = uint96(_bound(amount, 0, 400));
        bytes32 id = _challenge(_provider(1), amount);
        _draw(id);
        _decide(id, _bound(beyond, 3, 5));
        uint256 lost = 5_000 - registry.node(vm.addr(_provider(1))).stake;
        uint256 back = disputes.credited(vm.addr(CLIENT)) - disputes.dispute(id).bond;
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            back += disputes.credited(vm.addr(_verifier(i)));
        }
        _true(lost > 0 && back * 2 <= lost, "slashing oneself pays");
    }

    /// Too few seasoned verifiers: four of five restore, and do not slash.
    function test_model_with_few_seasoned_verifiers_has_restitution_only() public {
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(vm.addr(_verifier(i)));
            disputes.unenrol(MODEL);
        }
        _eq(disputes.seasonedCount(MODEL, uint64(block.timestamp)), 6, "seasoned");
        bytes32 id = _challenge(_provider(0), 10);
        _true(!disputes.dispute(id).slashable, "slashable");
        _draw(id);
        _decide(id, 5);
        _eq(uint256(disputes.dispute(id).outcome), uint256(Outcome.Restitution), "outcome");
        _eq(5_000 - registry.node(vm.addr(_provider(0))).stake, 2 * (10 + 5 * 3), "taken");
    }

    /// Members that are silent for too long lose their seats' stake, are drawn no more, and anyone may take them off the list.
    function test_evict_removes_only_seats_that_cover_no_fee() public {
        for (uint256 i = 0; i < 40 && disputes.seat(vm.addr(_verifier(0))).locked >= 7; ++i) {
            bytes32 id = _challenge(_provider(0), 0);
            blocks.roll(disputes.dispute(id).drawBlock + 1);
            disputes.draw(id, _nonce(id));
            if (disputes.dispute(id).outcome == Outcome.NoPanel) break;
            vm.warp(disputes.dispute(id).commitUntil);
            disputes.finish(id);
        }
        address silent;
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            address who = vm.addr(_verifier(i));
            uint96 left = disputes.seat(who).locked;
            _eq(registry.node(who).locked, left, "locked");
            _true(left % 7 == 50 % 7, "whole fees");
            if (left < 7) silent = who;
        }
        _true(silent != address(0), "nobody was silent long enough");
        disputes.evict(MODEL, silent);
        _eq(disputes.joinedEpoch(MODEL, silent), 0, "still there");
        disputes.releaseSeat(silent);
        _eq(registry.node(silent).locked, 0, "locked for ever");
    }

    /// Where parties hold so many of few seats that no five are left, the bond goes back and the provider is free.
    function test_draw_that_finds_no_five_ends_the_dispute_at_no_cost() public {
        for (uint256 i = 0; i < 4; ++i) {
            vm.prank(vm.addr(_verifier(i)));
            disputes.unenrol(MODEL);
        }
        address provider = vm.addr(_verifier(8)); // one of the five that are left
        _fund(token, provider, address(registry), 1);
        vm.prank(provider);
        registry.stake(provider, 5_000);
        uint256 locked = registry.node(provider).locked;
        bytes32 id = _challenge(_verifier(8), 10);
        _draw(id);
        _eq(uint256(disputes.dispute(id).outcome), uint256(Outcome.NoPanel), "outcome");
        _eq(disputes.credited(vm.addr(CLIENT)), disputes.dispute(id).bond, "bond");
        _eq(registry.node(provider).locked, locked, "unlocked");
        _eq(disputes.toBurn(), 0, "burned");
    }

    /// Every number beyond 2^63 or at the bound is counted on its side.
    /// forge-config: default.fuzz.runs = 100
    function testFuzz_count_compares_each_number_with_the_bound(uint64[5] memory numbers) public {
        bytes32 id = _challenge(_provider(0), 10);
        _draw(id);
        Dispute memory d = disputes.dispute(id);
        uint256 beyond;
        for (uint256 i = 0; i < 5; ++i) {
            if (numbers[i] % 3 == 0) numbers[i] = BOUND + numbers[i] % 2;
            if (numbers[i] > BOUND) ++beyond;
            bytes32 commitment = disputes.commitmentOf(id, d.members[i].operator, numbers[i], "s");
            vm.prank(d.members[i].operator);
            disputes.commit(id, commitment);
        }
        for (uint256 i = 0; i < 5; ++i) {
            vm.prank(d.members[i].operator);
            disputes.reveal(id, numbers[i], "s");
        }
        disputes.finish(id);
        Outcome expected = beyond >= 4 ? Outcome.Slashed : beyond == 3 ? Outcome.Restitution : Outcome.Dismissed;
        _eq(uint256(disputes.dispute(id).outcome), uint256(expected), "outcome");
    }

    /// A signature by anyone but scheduler and provider opens nothing.
    function testFuzz_challenge_with_a_forged_signature_is_refused(uint256 key, bool lease) public {
        key = _bound(key, 0x1000, type(uint64).max);
        (bytes32 id, Claim memory c) = _claim(_provider(0), 10);
        bytes32 statement = lease ? id : hasher.receipt(c.receipt);
        if (lease) c.leaseSignature = _signed(key, id);
        else c.receiptSignature = _signed(key, statement);
        address expected = vm.addr(lease ? SCHEDULER : _provider(0));
        vm.expectRevert(
            abi.encodeWithSelector(DisputeBook.WrongSigner.selector, statement, expected, vm.addr(key))
        );
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
    }

    /// Seasoned is who joined before; the count is exact whatever came and went since.
    /// forge-config: default.fuzz.runs = 100
    function testFuzz_seasonedCount_is_exact(uint8[12] memory moves, uint8 issuedAgo) public {
        uint256[9] memory joined;
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            joined[i] = disputes.joinedEpoch(MODEL, vm.addr(_verifier(i)));
        }
        for (uint256 m = 0; m < moves.length; ++m) {
            vm.warp(block.timestamp + moves[m] % 16);
            uint256 i = moves[m] % VERIFIERS;
            if (joined[i] == 0) {
                _enrol(i);
                joined[i] = block.timestamp / 10;
            } else {
                vm.prank(vm.addr(_verifier(i)));
                disputes.unenrol(MODEL);
                joined[i] = 0;
            }
        }
        uint256 issued = block.timestamp - issuedAgo;
        uint256 expected;
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            if (joined[i] != 0 && joined[i] + 1 < issued / 10) ++expected;
        }
        _eq(disputes.seasonedCount(MODEL, uint64(issued)), expected, "seasoned");
    }

    // ------------------------------------------------------------------ the constructor

    function test_constructor_refuses_terms_that_break_a_promise() public {
        Terms memory t;
        t = _terms();
        t.burnPpm = 499_999;
        _refused(t, "burnPpm");
        t.burnPpm = 900_001;
        _refused(t, "burnPpm");
        t = _terms();
        t.challengerPpm = 1_000_001;
        _refused(t, "challengerPpm");
        t = _terms();
        t.bondPpm = 1_000_001;
        _refused(t, "bondPpm");
        t = _terms();
        t.amountBondPpm = 1_000_001;
        _refused(t, "amountBondPpm");
        t = _terms();
        t.panelFee = 0;
        _refused(t, "panelFee");
        t = _terms();
        t.noShowFee = 2;
        _refused(t, "noShowFee");
        t = _terms();
        t.seatStake = 6;
        _refused(t, "seatStake");
        t = _terms();
        t.bondMinimum = 14;
        _refused(t, "bondMinimum");
        t = _terms();
        t.lockMinimum = 29;
        _refused(t, "lockMinimum");
        t = _terms();
        t.victimMultiple = 0;
        _refused(t, "victimMultiple");
        t = _terms();
        t.slashMultiple = 2;
        _refused(t, "slashMultiple");
        t = _terms();
        t.slashVerifiersMin = 4;
        _refused(t, "slashVerifiersMin");
    }

    function test_constructor_refuses_times_that_outlast_the_stake() public {
        Terms memory t;
        t = _terms();
        t.drawDelayBlocks = 129;
        _refused(t, "drawDelayBlocks");
        t = _terms();
        t.revealSeconds = 0;
        _refused(t, "revealSeconds");
        t = _terms();
        t.epochSeconds = 0;
        _refused(t, "epochSeconds");
        t = _terms();
        t.seasoningEpochs = 0;
        _refused(t, "seasoningEpochs");
        t.seasoningEpochs = 35; // 600 / 10 + 35 + 2 = 97
        _refused(t, "seasoningEpochs");
        t = _terms();
        t.challengeSeconds = UNBONDING - 420; // the dispute itself takes 420
        t.epochSeconds = 20;
        _refused(t, "unbondingDelay");
    }

    function test_constructor_refuses_a_registry_that_names_another() public {
        vm.expectRevert(abi.encodeWithSelector(DisputeBook.WrongRegistry.selector, address(registry)));
        new Disputes(IStakeRegistry(address(registry)), _terms());
    }

    function _refused(Terms memory t, bytes32 which) private {
        vm.expectRevert(abi.encodeWithSelector(DisputeTerms.InvalidTerms.selector, which));
        new Disputes(IStakeRegistry(address(registry)), t);
    }
}
