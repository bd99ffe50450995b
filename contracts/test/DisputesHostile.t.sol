// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IERC20Errors} from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import {DisputeBook} from "../src/disputes/DisputeBook.sol";
import {Claim, Outcome, State} from "../src/disputes/DisputeTypes.sol";
import {DisputesWorld} from "./DisputesWorld.sol";
import {
    BlacklistToken,
    FalseToken,
    FeeToken,
    LyingToken,
    NoReturnToken,
    RebasingToken,
    ReentrantToken
} from "./HostileTokens.sol";

interface VmEtch {
    function etch(address target, bytes calldata code) external;
}

/// The token turns hostile after everybody has staked: its code is exchanged, balances and allowances stay where they are.
contract DisputesHostileTokenTest is DisputesWorld {
    VmEtch private constant etcher = VmEtch(address(uint160(uint256(keccak256("hevm cheat code")))));
    address private constant ELSEWHERE = address(0xE15E);

    function setUp() public {
        _build();
    }

    function _turn(bytes memory code) private {
        etcher.etch(address(token), code);
    }

    function test_fee_on_transfer_token_cannot_be_bonded() public {
        _turn(type(FeeToken).runtimeCode);
        (, uint96 bond) = disputes.quote(vm.addr(_provider(0)), 1_000); // large enough that a hundredth of it is a unit
        (bytes32 id, Claim memory c) = _claim(_provider(0), 1_000);
        vm.expectRevert(abi.encodeWithSelector(DisputeBook.UnexpectedDeposit.selector, bond, bond - bond / 100));
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
        _eq(uint256(disputes.dispute(id).state), uint256(State.None), "opened");
        _eq(registry.node(vm.addr(_provider(0))).locked, 0, "locked");
    }

    function test_lying_token_cannot_be_bonded() public {
        _turn(type(LyingToken).runtimeCode);
        (, uint96 bond) = disputes.quote(vm.addr(_provider(0)), 10);
        (, Claim memory c) = _claim(_provider(0), 10);
        vm.expectRevert(abi.encodeWithSelector(DisputeBook.UnexpectedDeposit.selector, bond, 0));
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
    }

    /// Nothing opens, is paid or is taken on a "no": who is owed keeps its claim, and what waits for the token goes on when it moves again. A
    /// verdict that takes nothing does not ask it.
    function test_false_returning_token_reverts_and_every_claim_is_kept() public {
        _decideOne(0, 5);
        bytes32 guilty = _challenge(_provider(1), 10);
        bytes32 innocent = _challenge(_provider(2), 10);
        _draw(guilty);
        _draw(innocent);
        _turn(type(FalseToken).runtimeCode);
        FalseToken(address(token)).arm(true);
        bytes memory no = abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(token));
        (uint256 credit, uint256 waiting) = (disputes.credited(vm.addr(CLIENT)), disputes.toBurn());
        (bytes32 id, Claim memory c) = _claim(_provider(0), 10);
        vm.expectRevert(no);
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
        vm.expectRevert(no);
        vm.prank(vm.addr(CLIENT));
        disputes.withdraw(ELSEWHERE);
        vm.expectRevert(no);
        disputes.burn();
        _vote(guilty, 5);
        vm.expectRevert(no);
        disputes.finish(guilty);
        _eq(uint256(disputes.dispute(id).state), uint256(State.None), "opened");
        _eq(registry.node(vm.addr(_provider(0))).locked, 0, "locked");
        _eq(disputes.credited(vm.addr(CLIENT)), credit, "credit kept");
        _eq(disputes.toBurn(), waiting, "still to burn");
        _decide(innocent, 0);
        _eq(uint256(disputes.dispute(innocent).outcome), uint256(Outcome.Dismissed), "takes nothing");
        FalseToken(address(token)).arm(false);
        disputes.finish(guilty);
        _eq(uint256(disputes.dispute(guilty).outcome), uint256(Outcome.Slashed), "in the end");
    }

    /// A whole dispute with the oldest kind of ERC-20: bond, slash, withdrawals and burn, to the last unit.
    function test_token_that_returns_nothing_works() public {
        _turn(type(NoReturnToken).runtimeCode);
        _decideOne(0, 4);
        _everyoneWithdraws();
        disputes.burn();
        _eq(token.balanceOf(address(disputes)), 0, "left behind");
    }

    /// The book holds amounts, not shares: a payout is what is booked or nothing, and a surplus is nobody's. Verdicts go on.
    function test_rebasing_token_pays_what_is_booked_or_reverts_and_keeps_the_claim() public {
        _turn(type(RebasingToken).runtimeCode);
        RebasingToken rebasing = RebasingToken(address(token));
        rebasing.rebase(100);
        _decideOne(0, 5);
        (address client, uint256 held) = (vm.addr(CLIENT), token.balanceOf(address(disputes)));
        uint256 credit = disputes.credited(client);
        rebasing.rebase(25);
        vm.expectRevert(
            abi.encodeWithSelector(
                IERC20Errors.ERC20InsufficientBalance.selector, address(disputes), held, 4 * credit
            )
        );
        vm.prank(client);
        disputes.withdraw(ELSEWHERE);
        _eq(disputes.credited(client), credit, "claim kept");
        rebasing.rebase(200);
        (, Claim memory c) = _claim(_provider(1), 10);
        (, uint96 bond) = disputes.quote(vm.addr(_provider(1)), 10); // odd: half a share of it is lost
        vm.expectRevert(abi.encodeWithSelector(DisputeBook.UnexpectedDeposit.selector, bond, bond - 1));
        vm.prank(client);
        disputes.challenge(c);
        vm.prank(client);
        disputes.withdraw(ELSEWHERE);
        _eq(token.balanceOf(ELSEWHERE), credit / 2 * 2, "what is booked, in whole shares");
        _everyoneWithdraws();
        disputes.burn();
        _true(token.balanceOf(address(disputes)) >= held, "the surplus is nobody's");
    }

    function _decideOne(uint256 provider, uint256 beyond) private {
        bytes32 id = _challenge(_provider(provider), 10);
        _draw(id);
        _decide(id, beyond);
    }

    function _everyoneWithdraws() private {
        for (uint256 i = 0; i <= VERIFIERS; ++i) {
            address who = vm.addr(i == VERIFIERS ? CLIENT : _verifier(i));
            if (disputes.credited(who) == 0) continue;
            vm.prank(who);
            disputes.withdraw(who);
        }
    }

    /// A verdict pays nobody directly: an address that the token refuses holds up nothing, and is paid elsewhere.
    function test_blacklisted_payee_blocks_no_verdict_and_can_withdraw_elsewhere() public {
        bytes32 id = _challenge(_provider(0), 10);
        _draw(id);
        _turn(type(BlacklistToken).runtimeCode);
        address client = vm.addr(CLIENT);
        BlacklistToken(address(token)).refuse(client);
        _decide(id, 5);
        _eq(uint256(disputes.dispute(id).outcome), uint256(Outcome.Slashed), "outcome");
        uint256 amount = disputes.credited(client);
        vm.expectRevert(abi.encodeWithSelector(BlacklistToken.Refused.selector, client));
        vm.prank(client);
        disputes.withdraw(client);
        _eq(disputes.credited(client), amount, "credit kept");
        vm.prank(client);
        disputes.withdraw(ELSEWHERE);
        _eq(token.balanceOf(ELSEWHERE), amount, "paid elsewhere");
    }

    /// Where the token refuses the address that burns, the tokens stay here, nobody's; verdicts go on.
    function test_blacklisted_burn_address_holds_up_no_verdict() public {
        _turn(type(BlacklistToken).runtimeCode);
        BlacklistToken(address(token)).refuse(disputes.BURN_ADDRESS());
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 id = _challenge(_provider(i), 10);
            _draw(id);
            _decide(id, 4);
        }
        uint256 waiting = disputes.toBurn();
        vm.expectRevert(abi.encodeWithSelector(BlacklistToken.Refused.selector, disputes.BURN_ADDRESS()));
        disputes.burn();
        _eq(disputes.toBurn(), waiting, "still to burn");
    }

    /// From inside a transfer no function that moves tokens or stake can be entered, and no credit is paid twice.
    function test_reentrant_token_cannot_reenter_any_function_that_moves_tokens() public {
        bytes32 id = _challenge(_provider(0), 10);
        bytes32 other = _challenge(_provider(1), 10);
        _draw(id);
        _turn(type(ReentrantToken).runtimeCode);
        ReentrantToken hostile = ReentrantToken(address(token));
        hostile.arm(address(disputes), abi.encodeCall(disputes.finish, (id)));
        _decide(id, 5); // the slash inside it calls back
        _met(hostile);
        bytes[4] memory again = [
            abi.encodeCall(disputes.withdraw, (ELSEWHERE)),
            abi.encodeCall(disputes.burn, ()),
            abi.encodeCall(disputes.draw, (other, _nonce(other))),
            abi.encodeCall(disputes.releaseSeat, (vm.addr(CLIENT)))
        ];
        uint256 held = token.balanceOf(address(disputes));
        uint256 paid;
        for (uint256 i = 0; i < again.length; ++i) {
            address member = disputes.dispute(id).members[i].operator; // all five were paid
            hostile.arm(address(disputes), again[i]);
            paid += disputes.credited(member);
            vm.prank(member);
            disputes.withdraw(member);
            _met(hostile);
        }
        _eq(token.balanceOf(address(disputes)), held - paid, "paid once");
    }

    function _met(ReentrantToken hostile) private view {
        _true(!hostile.succeeded(), "came in again");
        _true(bytes4(hostile.answer()) == bytes4(keccak256("ReentrancyGuardReentrantCall()")), "another reason");
    }
}
