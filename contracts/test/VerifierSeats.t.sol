// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Dispute, State} from "../src/disputes/DisputeTypes.sol";
import {List, Places} from "../src/disputes/Places.sol";
import {Base} from "./Base.sol";
import {DisputesWorld} from "./DisputesWorld.sol";

interface VmState {
    function snapshotState() external returns (uint256);
    function revertToState(uint256 snapshot) external returns (bool);
}

contract VerifierSeatsTest is DisputesWorld {
    VmState private constant states = VmState(address(uint160(uint256(keccak256("hevm cheat code")))));

    function setUp() public {
        _build();
    }

    function _leave(uint256 i) private {
        vm.prank(vm.addr(_verifier(i)));
        disputes.unenrol(MODEL);
    }

    /// One operator joins and leaves for gas alone while draws overlap, so that nobody may compact: the list keeps its length, and whoever
    /// challenges then finds a panel of those who stayed.
    function test_joining_and_leaving_while_a_draw_is_pending_does_not_lengthen_the_list() public {
        bytes32 first = _challenge(_provider(0), 10);
        for (uint256 i = 0; i < 200; ++i) {
            _leave(0);
            _enrol(0);
        }
        _eq(disputes.verifierCount(MODEL), VERIFIERS, "length");
        bytes32 second = _challenge(_provider(1), 10);
        _draw(first);
        _leave(0);
        for (uint256 i = 0; i < 200; ++i) {
            _enrol(0);
            _leave(0);
        }
        _eq(disputes.verifierCount(MODEL), VERIFIERS, "length while draws overlap");
        _draw(second);
        bytes32 third = _challenge(_provider(2), 10);
        _draw(third);
        _eq(uint256(disputes.dispute(third).state), uint256(State.Drawn), "a panel");
        for (uint256 i = 0; i < 5; ++i) {
            _true(disputes.dispute(third).members[i].operator != vm.addr(_verifier(0)), "drawn after leaving");
        }
    }

    /// A draw that is pending seats the same five whether the holes of those who left stay holes or are sat in by newcomers.
    function testFuzz_newcomers_in_holes_change_no_pending_draw(uint256 leavers, uint256 order) public {
        bytes32 id = _challenge(_provider(0), 10);
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            if (leavers >> i & 3 == 0) _leave(i);
        }
        uint256 holes = states.snapshotState();
        _draw(id);
        Dispute memory expected = disputes.dispute(id);
        states.revertToState(holes);
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            uint256 who = (order % VERIFIERS + i) % VERIFIERS;
            if (disputes.joinedEpoch(MODEL, vm.addr(_verifier(who))) == 0) _enrol(who);
        }
        _eq(disputes.verifierCount(MODEL), VERIFIERS, "length");
        _draw(id);
        Dispute memory d = disputes.dispute(id);
        _eq(uint256(d.outcome), uint256(expected.outcome), "outcome");
        for (uint256 i = 0; i < 5; ++i) {
            _eq(d.members[i].operator, expected.members[i].operator, "member");
        }
    }

    /// Whatever is left of a list full of holes: they are filled by whoever comes, or taken out when no draw is pending, in any order.
    function testFuzz_compact_takes_every_hole_out_in_any_order(uint256 leavers, uint256 order) public {
        bytes32 id = _challenge(_provider(0), 10);
        uint256 left;
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            if (leavers >> i & 1 == 0) continue;
            _leave(i);
            ++left;
        }
        _draw(id);
        uint256 returned = left / 3;
        for (uint256 i = 0; i < VERIFIERS && returned != 0; ++i) {
            if (leavers >> i & 1 == 0) continue;
            _enrol(i);
            (--returned, --left);
        }
        for (; left != 0; --left) {
            uint256 size = disputes.verifierCount(MODEL);
            uint256 place = order % size;
            while (disputes.verifierAt(MODEL, place) != address(0)) place = (place + 1) % size;
            disputes.compact(MODEL, place);
            order = order / 7;
        }
        for (uint256 i = 0; i < disputes.verifierCount(MODEL); ++i) {
            _true(disputes.verifierAt(MODEL, i) != address(0), "a hole is left");
        }
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            if (disputes.joinedEpoch(MODEL, vm.addr(_verifier(i))) != 0) _leave(i); // finds its own place, wherever it was moved
        }
        _eq(disputes.verifierCount(MODEL), 0, "left behind");
    }
}

/// The list by itself, against what it promises.
contract PlacesTest is Base {
    using Places for List;

    List private list;
    mapping(address => uint256) private placeOf;
    address[] private members;
    uint256 private most;
    uint160 private names;

    function testFuzz_list_is_never_longer_than_its_most_members_and_names_its_holes(uint8[60] memory moves)
        public
    {
        for (uint256 i = 0; i < moves.length; ++i) {
            _move(moves[i] % 4, moves[i] >> 2);
            _check();
        }
    }

    function _move(uint256 kind, uint256 pick) private {
        if (kind == 0 || members.length == 0) {
            address name = address(++names);
            placeOf[name] = list.join(name);
            members.push(name);
            if (members.length > most) most = members.length;
        } else if (kind == 3) {
            if (list.holes.length == 0) return;
            uint256 hole = list.holes[pick % list.holes.length];
            _settle(list.fill(hole), hole);
        } else {
            address leaver = members[pick % members.length];
            members[pick % members.length] = members[members.length - 1];
            members.pop();
            if (kind == 1) list.vacate(placeOf[leaver]);
            else _settle(list.shrink(placeOf[leaver]), placeOf[leaver]);
        }
    }

    function _settle(address moved, uint256 place) private {
        if (moved != address(0)) placeOf[moved] = place;
    }

    function _check() private view {
        _true(list.places.length <= most, "longer than its most members");
        _eq(list.places.length, members.length + list.holes.length, "length");
        for (uint256 i = 0; i < members.length; ++i) {
            _eq(list.places[placeOf[members[i]]], members[i], "place");
        }
        for (uint256 i = 0; i < list.holes.length; ++i) {
            _eq(list.places[list.holes[i]], address(0), "hole");
            _eq(list.entryOf[list.holes[i]], i, "name of a hole");
        }
    }
}
